"Codecs in folders of our own: by kind and name, the same to the bit."
import inspect
import pytest, torch
from diffnb.core import create, presets
from diffnb.hub import load_folder, save_folder
from diffnb.store import load_json

TINY = dict(pixels={}, token_codec=dict(vocab=9, dim=6), vae_tiny=dict(z=3, quant=False))
def test_all_are_saved():
    "Every codec of the package is among those below, or is a larger one of the same class."
    known = {type(create(n, kind='codec', **kw)) for n,kw in TINY.items()}
    with torch.device('meta'): made = {n: type(create(n, kind='codec', **TINY.get(n, {}))) for n,f in presets('codec').items()
                                       if inspect.unwrap(f).__module__.startswith('diffnb.') and 'path' not in inspect.signature(f).parameters} # those open a folder
    assert set(made.values())<=known and len(made)>4

@pytest.mark.parametrize('name', TINY)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_saved_and_loaded(name, dtype, tmp_path):
    "In our own form, by its kind and name: the same tensors to the bit, the same dtype, the same result."
    c = create(name, kind='codec', **TINY[name]).to(dtype)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in c.parameters(): p.copy_(torch.randn(p.shape, generator=g)) # which keeps the order in memory
    save_folder(c, tmp_path/'c')
    back = load_folder(tmp_path/'c')
    assert type(back) is type(c) and back.preset==c.preset
    a,b = c.state_dict(),back.state_dict()
    assert a.keys()==b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype==b[k].dtype for k in a)
    x = torch.randint(9, (2, 5), generator=g) if name=='token_codec' else torch.randint(256, (2, 3, 8, 8), generator=g).to(torch.uint8)
    assert torch.equal(c.encode(x), back.encode(x))

def test_the_kind_is_in_the_file(tmp_path):
    "A preset of another kind may have the same name: the file says which is meant."
    for kind,name in (('codec', 'vae_tiny'), ('denoiser', 'dit_tiny'), ('control', 'control')):
        kw = dict(widths=(8,), layers=1, depth=0, mid=0, heads=2, ctx=8, groups=4) if name=='control' else {}
        net = create(name, kind=kind, **kw)
        save_folder(net, tmp_path/name)
        assert net.preset==dict(kind=kind, name=name, kw=kw) and load_json(tmp_path/name/'config.json')['kind']==kind
        assert type(load_folder(tmp_path/name)) is type(net)
