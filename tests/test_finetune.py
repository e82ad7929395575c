"diffnb finetune, sample --adapter and compare, from the command line at tiny size; mistakes cost one line."
import json
from pathlib import Path
import numpy as np
import pytest
from diffnb.cli import main
from diffnb.finetune import as_table, gathered
from diffnb.store import load_json, load_tensors
from shell import ask

TINY = '''
model: {name: diffit_tiny, size: 28, ch: 1}
train: {steps: 4, batch: 4, drop: 0.1, save_every: 2, log_every: 2, lr: {name: constant, lr: 1.0e-2}}
sample: {n: 2, steps: 2, sampler: euler, average: null}
eval: {n: 70, metrics: [kid]}
'''

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A folder with a recipe and a base."
    root, mp = tmp_path_factory.mktemp('tuned'), pytest.MonkeyPatch()
    mp.chdir(root)
    Path('tiny.yaml').write_text(TINY)
    assert main(['train', 'tiny.yaml', '--out', 'base'])==0
    yield root
    mp.undo()

def numbers(path):
    with np.load(path) as f: return {k: f[k] for k in f.files}
def same(a, b): return a.keys()==b.keys() and all(np.array_equal(v, b[k]) for k,v in a.items())

def test_finetune_and_sample(made, capsys):
    assert ask('finetune tiny.yaml --base base --adapter lora --out t', capsys)[0]==0
    model = load_tensors(next(Path('t').glob('step-00000004'))/'model.safetensors')[0]
    assert all('adapters' in k.split('.') for k in model) and Path('t/adapter/adapter.safetensors').stat().st_size<60_000
    for k,flags in dict(plain='', off='--adapter t --adapter_scale 0', on='--adapter t', inner='--adapter t/adapter', half='--adapter t --adapter_scale .5').items():
        assert ask(f'sample base --out {k}.npz {flags}', capsys)[0]==0
    plain, off, on, inner, half = (numbers(f'{k}.npz') for k in ('plain', 'off', 'on', 'inner', 'half'))
    assert same(plain, off) and same(on, inner) and not same(on, plain) and not same(half, on) and not same(half, plain)

def test_it_goes_on(made, capsys):
    "Two steps and two are four; the base is the same one."
    for n in (2, 4): assert ask(f'finetune tiny.yaml --base base --adapter bitfit --out parts --train.steps={n}', capsys)[0]==0
    assert ask('finetune tiny.yaml --base base --adapter bitfit --out whole', capsys)[0]==0
    a, b = (load_tensors(f'{k}/adapter/adapter.safetensors')[0] for k in ('parts', 'whole'))
    assert a.keys()==b.keys() and all((v==b[k]).all() for k,v in a.items())
    code, _, err = ask('finetune tiny.yaml --base base --adapter lora --out parts', capsys)
    assert code==2 and 'adapter.name' in err

def test_options_and_the_whole_network(made, capsys):
    assert ask(['finetune', 'tiny.yaml', '--base', 'base', '--adapter', '{name: lora, rank: 2}', '--out', 'two'], capsys)[0]==0
    assert min(min(v.shape) for v in load_tensors('two/adapter/adapter.safetensors')[0].values())==2
    code, _, err = ask(['finetune', 'tiny.yaml', '--base', 'base', '--adapter', '{name: lora, rnak: 2}', '--out', 'no'], capsys)
    assert code==2 and "did you mean 'rank'" in err and not Path('no').exists()
    assert ask('finetune tiny.yaml --base base --adapter full --out f', capsys)[0]==0
    assert ask('sample f/weights --out f.npz', capsys)[0]==0 and ask('sample base --out p.npz', capsys)[0]==0
    assert not same(numbers('f.npz'), numbers('p.npz'))

def test_what_is_left_is_the_average(made, capsys):
    "Where the recipe samples with one: the adapter's file has the averages, not the last numbers."
    assert ask(['finetune', 'tiny.yaml', '--base', 'base', '--out', 'mean', '--train.averages={slow: {name: halflife, images: 8}}', '--sample.average=slow'], capsys)[0]==0
    step, left = next(Path('mean').glob('step-*4')), load_tensors('mean/adapter/adapter.safetensors')[0]
    slow, last = ({k.replace('.adapters.default', ''): v for k,v in load_tensors(step/f'{n}.safetensors')[0].items()} for n in ('ema-slow', 'model'))
    assert left.keys()==slow.keys() and all((v==slow[k]).all() for k,v in left.items()) and any((v!=last[k]).any() for k,v in left.items())

def test_seeds_together():
    "Means, deviations and times of a grid by hand: times are over the first method's of the same task."
    def cell(method, seed, cpu, kid, task='a'): return dict(task=task, method=method, seed=seed, cpu=cpu, parameters=3, bytes=12, held=24, metrics=dict(kid=kid))
    rows = gathered([cell('full', 0, 2., 1.), cell('lora', 0, 1., 5.), cell('full', 1, 4., 4.), cell('lora', 1, 2., 5.), cell('lora', 0, 8., 7., 'b')])
    assert [(r['task'], r['method'], r['seeds'], r['time']) for r in rows]==[('a', 'full', 2, 1.), ('a', 'lora', 2, .5), ('b', 'lora', 1, 1.)]
    assert rows[0]['metrics']['kid']==pytest.approx((2.5, 4.5**.5)) and rows[1]['metrics']['kid']==(5., 0.) and rows[2]['metrics']['kid']==(7., 0.)
    assert as_table(rows).splitlines()[2]=='| a | full | 2.5 ± 2.1 | 2 | 3 | 12 | 24 | 1.00 |'

WRONG = {
    'finetune tiny.yaml --base base --adapter lroa': "did you mean 'lora'",
    'finetune tiny.yaml --base nowhere': 'there is no run or weights nowhere',
    'finetune tiny.yaml': 'base',
    'finetune tiny.yaml --base base --model.scale=100': 'an adapter needs the same',
    'finetune tiny.yaml --base fashion': 'an adapter needs the same',
    'sample base --adapter base --out x.npz': 'there is no adapter in base',
    'sample base --adapter nowhere --out x.npz': 'there is no adapter in nowhere',
    'compare tiny.yaml --base base --adapters lora,bitfti': "did you mean 'bitfit'",
    'compare tiny.yaml --base base --only 6': '--only is from 0 to 5',
}
@pytest.mark.parametrize('line', WRONG)
def test_mistakes(made, line, capsys):
    code, out, err = ask(line, capsys)
    assert code==2 and WRONG[line] in err and 'Traceback' not in err and not Path('x.npz').exists() and not Path('compare').exists()

def test_an_adapter_for_another_base(made, capsys):
    assert ask('finetune tiny.yaml --base base --adapter bitfit --out other --train.steps=1', capsys)[0]==0
    assert ask('train tiny.yaml --out base2 --train.seed=5', capsys)[0]==0
    code, _, err = ask('sample base2 --adapter other --out y.npz', capsys)
    assert code==2 and 'another base' in err

def test_compare_goes_on(made, capsys):
    line = 'compare tiny.yaml --base base --adapters full,bitfit --seeds 2 --out grid --train.steps=1 --sample.steps=1'
    assert ask(f'{line} --slurm', capsys)[0]==0
    assert '--array=0-3' in Path('grid/array.sh').read_text() and '--only $SLURM_ARRAY_TASK_ID' in Path('grid/array.sh').read_text()
    assert '--train.steps=1' in Path('grid/array.sh').read_text() and not Path('grid/cells').exists()
    assert ask(f'{line} --only 3', capsys)[0]==0 # as a task of the array does
    assert [p.stem for p in Path('grid/cells').iterdir()]==['tiny-bitfit-1']
    was = Path('grid/cells/tiny-bitfit-1.json').read_bytes()
    code, out, _ = ask(line, capsys)
    assert code==0 and 'tiny-full-0' in out and 'tiny-bitfit-1' not in out.split('|')[0]
    assert Path('grid/cells/tiny-bitfit-1.json').read_bytes()==was
    rows = [load_json(p) for p in sorted(Path('grid/cells').iterdir())]
    assert len(rows)==4 and {r['seed'] for r in rows}=={0, 1} and len({json.dumps(r['metrics']) for r in rows})==4
    table = Path('grid/table.md').read_text()
    assert table.count('\n')==4 and '| tiny | bitfit |' in table and '±' in table and Path('grid/plot.png').stat().st_size>3000
