"Mutated recipes, JSON files and safetensors headers. `python tests/fuzz.py --n 10000` makes nbs/results/fuzz.json."
import json, shutil, subprocess, sys
from pathlib import Path
import pytest, torch
from torch import nn
from diffnb.bench import kept
from diffnb.cli import main
from diffnb.core import at_most, create
from diffnb.parts import read_yaml
from diffnb.rng import Rng
from diffnb.saving import Damaged, load, load_fields, save
from diffnb.store import load_json, load_tensors, save_json, write_folder
from diffnb.train.checkpoint import Progress, load_denoiser, save_checkpoint
from fuzz import KINDS, seal

HERE = Path(__file__).parent

def test_three_hundred():
    "A clear error or the right result, in a process of its own: its memory is watched."
    r = subprocess.run([sys.executable, HERE/'fuzz.py', '--n', '300'], capture_output=True, text=True)
    assert r.returncode==0, r.stdout[-3000:]+r.stderr[-3000:]

def test_the_ten_thousand_that_were_counted():
    page = kept('fuzz', HERE.parent/'nbs'/'results')
    rows = {r['what']: r for r in page['rows']}
    assert page['command'].startswith('python tests/fuzz.py') and tuple(rows)==KINDS
    assert sum(r['read']+r['refused'] for r in rows.values())>=10_000 and all(r['fault']==0 for r in rows.values())
    assert all(r['read']>50 and r['refused']>1000 for r in rows.values()) # some are nearly right, and most are wrong

LAUGHS = 'a0: &a0 [x,x,x,x,x,x,x,x,x]\n'+''.join(f'a{i+1}: &a{i+1} [{",".join([f"*a{i}"]*9)}]\n' for i in range(20))
YAML = { # what is written -> what is said
    LAUGHS: 'more than 10000 values', 'a: &a [*a]': 'levels', '['*20000: 'not YAML of plain values', 'a: 2020-01-01': 'put it in quotes',
    'a: 2020-99-99': 'not YAML of plain values', '1: 2': 'is no word', 'a: .nan': 'no finite number', 'a: '+'9'*400: 'too many digits',
    'a: !!set {b}': 'put it in quotes', 'a: !!python/object/apply:os.system [ls]': 'could not determine a constructor', 'a: "'+'x'*2**20+'"': 'too long'}

@pytest.mark.parametrize('text', YAML, ids=lambda o: o[:20])
def test_yaml_that_is_no_recipe(text, tmp_path):
    (tmp_path/'a.yaml').write_text(text)
    with pytest.raises(ValueError, match=YAML[text]): read_yaml(tmp_path/'a.yaml', 'recipe')

@pytest.mark.parametrize('recipe', ['model: {name: [dit_tiny]}', 'model: dit_tiny\ntrain: {averages: 5}', 'model: dit_tiny\ntrain: {averages: ema}',
    'model: dit_tiny\ndata: {transforms: 3}', 'model: dit_tiny\ndata: {transforms: floats}', 'model: {name: dit_tiny, size: 999999999999999}',
    'model: dit_tiny\neval: '+'a'*5000, 'model: dit_tiny\ntrain: {lr: null}', 'model: dit_tiny\ntrain: {averages: null}',
    'model: mlm\nsystem: masked_text\ndata: {set: {path: x}}', 'model: {name: dit, size: 8796093022208}'])
def test_recipes_that_used_to_break(recipe, tmp_path, capsys):
    (tmp_path/'a.yaml').write_text(recipe+'\n')
    assert main(['train', str(tmp_path/'a.yaml'), '--print_config'])==2
    err = capsys.readouterr().err
    assert err.startswith('diffnb: ') and err.count('\n')==1 and len(err)<1100

def test_json_of_nothing(tmp_path):
    "Three bytes a list in the file would be sixty-four in memory."
    (tmp_path/'a.json').write_text('['+','.join(['[]']*2**20)+',[],[]]')
    with pytest.raises(Damaged, match='million'): load_json(tmp_path/'a.json')

def test_a_note_too_deep(tmp_path):
    head = json.dumps({'__metadata__': {'diffnb': '['*100_000}}).encode()
    (tmp_path/'t').write_bytes(len(head).to_bytes(8, 'little')+head)
    with pytest.raises(Damaged): load_tensors(tmp_path/'t')

@pytest.mark.parametrize('bad', [1.5, 'lora', [], {}, dict(base={}, adapters={}, use={}), dict(base=dict(preset='x', fingerprint='', network='x'), adapters=dict(a=dict(b=3)), use={})])
def test_adapters_that_cannot_be(tmp_path, bad):
    net = create('dit_tiny', size=4, ch=1, patch=2, classes=2)
    save_checkpoint(tmp_path/'run', net, torch.optim.SGD(net.parameters(), .1), {}, Progress(1, 4), Rng(0))
    at = tmp_path/'run'/'step-00000001'
    save_json(at/'state.json', {**load_json(at/'state.json'), 'adapted': bad})
    seal(at, 'state.json')
    with pytest.raises(Damaged, match='which base'): load_denoiser(tmp_path/'run', None)

def test_fields(tmp_path):
    save_json(tmp_path/'a.json', dict(n=1, s='x', yes=True))
    assert load_fields(tmp_path/'a.json', n=int, s=str)['yes'] is True
    for bad in (dict(m=int), dict(s=int), dict(yes=int)):
        with pytest.raises(Damaged, match=next(iter(bad))): load_fields(tmp_path/'a.json', **bad)

def test_a_network_that_its_file_cannot_fill(tmp_path):
    "A configuration for a network of gigabytes, over a file of kilobytes: refused before it is made."
    save(create('dit_tiny', size=4, ch=1, patch=2, classes=2), tmp_path/'net')
    with write_folder(tmp_path/'bad') as f:
        shutil.copy(tmp_path/'net'/'model.safetensors', f)
        config = load_json(tmp_path/'net'/'config.json')
        save_json(f/'config.json', {**config, 'kw': {**config['kw'], 'classes': 10**9}})
    with pytest.raises(ValueError, match='the network has .* numbers'): load(tmp_path/'bad')

def test_a_depth_without_end():
    with pytest.raises(ValueError, match='more than 10 modules'), at_most(10): nn.Sequential(*[nn.Sequential(nn.Linear(1, 1)) for _ in range(20)])
    with at_most(10): nn.Sequential(nn.Linear(1, 1))
