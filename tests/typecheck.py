"Checks every annotation of diffnb, shapes too, in every call: beartype through jaxtyping's import hook."
import os, sys
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

check = beartype(conf=BeartypeConf(is_pep484_tower=True)) # an int will do for a float

def install():
    "To be called before diffnb is imported. DIFFNB_TYPECHECK=0 switches it off, as the tests of torch.compile need."
    if os.environ.get('DIFFNB_TYPECHECK', '1')=='0': return
    assert 'diffnb' not in sys.modules, 'diffnb was imported before its annotations could be checked'
    install_import_hook('diffnb', 'typecheck.check')
