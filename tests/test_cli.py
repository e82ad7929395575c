"The command line: mistakes cost one line and exit code 2 and write nothing; the rest works on a small network."
import json, os, re, subprocess, sys
from pathlib import Path
from unittest.mock import ANY
import numpy as np
import pytest
from PIL import Image
from diffnb.recipes import check, consistent, read, shipped
from shell import ask

TINY = '''
about: a small network for garments
model: {name: diffit_tiny, size: 28, ch: 1}
train: {steps: 4, batch: 8, drop: 0.1, save_every: 2, log_every: 1, sample_every: 4, lr: {name: constant, lr: 1.0e-3}}
sample: {n: 10, steps: 2, sampler: euler}
eval: {n: 70, metrics: [fid, kid]}
'''

@pytest.fixture
def here(tmp_path, monkeypatch):
    "An empty folder with a recipe in it."
    monkeypatch.chdir(tmp_path)
    Path('tiny.yaml').write_text(TINY)
    return tmp_path

def files(root): return {str(p.relative_to(root)): p.read_bytes() for p in Path(root).rglob('*') if p.is_file()}

WRONG = { # command -> what the one line says
    'train fashon_quickstart': "did you mean 'fashion_quickstart'",
    'train missing.yaml': 'there is no file missing.yaml',
    'train broken.yaml': 'broken.yaml, line 3',
    'train list.yaml': 'holds no recipe',
    'train binary.yaml': 'is not text',
    'train key.yaml': "train.stepz (did you mean 'train.steps'?)",
    'train nomodel.yaml': 'a recipe needs a model',
    'train tiny.yaml --train.stepz=5': "no flag --train.stepz (did you mean 'train.steps'?)",
    'train tiny.yaml --steps 5': 'no flag --steps',
    'train tiny.yaml --train.steps=many': 'train.steps: expected int, not many',
    'train tiny.yaml --train.steps': '--train.steps needs a value',
    'train tiny.yaml --train.steps=0': 'train.steps must be at least 1',
    'train tiny.yaml --train.accumulate=9': 'train.accumulate = 9 parts of a batch of 8',
    'train tiny.yaml --train.drop=1.5': 'train.drop is a probability',
    'train tiny.yaml --train.amp=float61': "did you mean 'float16'",
    'train tiny.yaml --sample.guide=interval --sample.w=2': 'there is a sample.guide: give the weight to it',
    'train tiny.yaml --sample.guide=intervall': "did you mean 'interval'",
    'train tiny.yaml --model=diffit_tinny': "no denoiser is called 'diffit_tinny' (did you mean 'diffit_tiny'?)",
    'train tiny.yaml --model.heads=3': "diffit_tiny has no argument 'heads'",
    'train tiny.yaml --model.size=30': 'diffit_tiny: ',
    'train tiny.yaml --model.ch=3': 'takes 3x28x28, and fashion_mnist has images of 1x28x28',
    'train tiny.yaml --model.classes=7': 'has 7 classes, and fashion_mnist has 10',
    'train tiny.yaml --data.set=cifar10': 'missing path',
    'train folder.yaml': 'data.set.path: no/such/folder is not there',
    'train tiny.yaml --process.pred=eps': 'use v, x0 or flow',
    'train tiny.yaml --process.schedule=strait': "did you mean 'straight'",
    'train tiny.yaml --train.lr.name=cosine --train.lr.end=5 --train.lr.warmup=10': 'its warm-up ends at 10',
    'train tiny.yaml --sample.average=emma': "did you mean 'ema'",
    'train tiny.yaml --eval.metrics=[fid,fud]': "eval.metrics cannot be 'fud'",
    'train tiny.yaml --process.learned=learned_range': 'does not give twice the channels',
    'train tiny.yaml --distill.until=0': 'distill.until must be at least 1',
    'train tiny.yaml --out tiny.yaml': 'is a file',
    'train': 'missing recipe',
    'trian tiny.yaml': "did you mean 'train'",
    'sample nowhere --out x.png': 'there is no run or weights nowhere',
    'sample empty --out x.png': 'there is no complete checkpoint in empty',
    'sample': 'missing where',
    'sample tiny.yaml --out x.png --nn 3': "no flag --nn",
    'sample tiny.yaml --out x.png --n three': 'n: expected int or null, not three',
    'eval nowhere': 'there is no run',
    'export nowhere --out x': 'there is no run',
    'distill nowhere --out x': 'there is no run',
    'distill fashion --out x --n 12': 'power of two',
    'distill fashion --out x --train.stepz 5': "did you mean 'train.steps'",
    'list sampelr': "did you mean 'sampler'",
    'params diffit_cifar': "did you mean 'diffit_cifar10'",
}

@pytest.mark.parametrize('words', WRONG)
def test_mistakes(words, here, capsys):
    Path('empty').mkdir()
    Path('broken.yaml').write_text('model: diffit_tiny\ntrain: {steps: [\n')
    Path('list.yaml').write_text('- 1\n- 2\n')
    Path('binary.yaml').write_bytes(b'\xff\xfe\x00\x01model')
    Path('key.yaml').write_text(TINY.replace('steps: 4', 'stepz: 4'))
    Path('nomodel.yaml').write_text('train: {steps: 4}\n')
    Path('folder.yaml').write_text(TINY+'data: {set: {name: folder, path: no/such/folder, size: 28, channels: 1}}\n')
    before = files(here)
    code, out, err = ask(words, capsys)
    assert code==2 and WRONG[words] in err, err
    assert err.startswith('diffnb: ') and err.count('\n')==1 and len(err)<400 and not out
    assert files(here)==before and not Path('runs').exists()

def test_session(here, capsys):
    "Train, go on, sample, measure; then the mistakes that need a run."
    assert ask('train tiny.yaml --out run --train.steps=2', capsys)[0]==0
    code, out, _ = ask('train tiny.yaml --out run', capsys)
    assert code==0 and 'run has 4 steps, 32 samples' in out and 'going on from step-00000002' in Path('run/log.txt').read_text()
    assert Path('run/samples/step-00000004.png').exists() and len(Path('run/log.jsonl').read_text().splitlines())==4
    assert ask('train tiny.yaml --out run', capsys)[0]==0 # nothing left to do
    before = files(here)
    assert ask('train tiny.yaml --out run --train.batch=16', capsys)[2].startswith('diffnb: run was started with train.batch = 8')
    assert ask('sample run --out x.gif', capsys)[0]==2 and ask('sample run --y 10 --out x.png', capsys)[0]==2
    assert ask('sample run --sampler heum --out x.png', capsys)[2].strip().endswith("(did you mean 'heun'?)")
    assert ask('sample run --out no/x.png', capsys)[0]==2 and 'too few' in ask('eval run --n 64', capsys)[2]
    assert files(here)==before
    assert ask('sample run --n 12 --steps 3 --sampler ddim --w 1.5 --y 3 --seed 1 --out x.npz', capsys)[0]==0
    with np.load('x.npz') as z: assert z['x'].shape==(12, 28, 28, 1) and z['x'].dtype==np.uint8 and (z['y']==3).all()
    assert ask('sample run/step-00000004 --out x.png', capsys)[0]==0
    assert Image.open('x.png').size==(291, 30) # ten classes side by side
    assert ask('export run --out given', capsys)[0]==0 and 'exists' in ask('export run --out given', capsys)[2]
    assert ask('sample given --n 12 --steps 3 --sampler ddim --w 1.5 --y 3 --seed 1 --out y.npz', capsys)[0]==0
    with np.load('x.npz') as a, np.load('y.npz') as b: assert (a['x']==b['x']).all()
    assert ask('distill run --out fast --n 4 --until 2 --distill.steps=2', capsys)[0]==0 and 'exists' in ask('distill run --out fast', capsys)[2]
    assert ask('sample fast --n 4 --out z.npz', capsys)[0]==0 and '2 times are listed' in ask('sample fast --n 4 --steps 3 --out u.npz', capsys)[2]
    code, out, _ = ask('eval run', capsys)
    assert code==0 and 'fid' in out and 'kid' in out
    assert [json.loads(o)['metric'] for o in Path('run/eval.jsonl').read_text().splitlines()]==['fid', 'kid']

def test_what_is_kept_and_what_is_hooked(here, capsys, monkeypatch):
    "A system's texts lie in the run, are there when its task is made again, and go along with exported weights; hooks of system and recipe are called."
    from dataclasses import replace
    from diffnb import core
    from diffnb.recipes.images import images
    seen, usual = [], images()
    def task(r, folder=None):
        seen.append(folder and (folder/'words.txt').exists())
        return usual.task(r, folder)
    def hooks(r, task, data): return dict(step=lambda run: seen.append(f'step {run.progress.step}'), end=[lambda run: seen.append('end')])
    def counted(word:str='hook'): return lambda r, task, data: dict(step=lambda run: seen.append(f'{word} {run.progress.step}'))
    known = {**core._presets, ('system', 'wordy'): lambda: replace(usual, task=task, keep=lambda r, task: {'words.txt': 'kept'}, hooks=hooks),
             ('hook', 'counted'): counted}
    monkeypatch.setattr(core, '_presets', known)
    Path('wordy.yaml').write_text(TINY.replace('save_every: 2', 'save_every: 2, hooks: [{name: counted, word: recipe}]')+'system: wordy\n')
    assert ask('train wordy.yaml --out run --train.steps=2', capsys)[0]==0
    assert seen==[False, 'step 1', 'recipe 1', 'step 2', 'recipe 2', 'end']
    assert ask('export run --out given', capsys)[0]==0 and Path('given/words.txt').read_text()=='kept'
    assert ask('train wordy.yaml --out run --train.steps=3 --train.hooks=null', capsys)[0]==0 # hooks may change on the way
    assert seen[6:]==[True, True, 'step 3', 'end']
    assert ask('sample given --out a.png', capsys)[0]==0 and seen[-1] is True
    code, out, err = ask('train tiny.yaml --weights=nowhere', capsys)
    assert code==2 and 'weights: there is no folder nowhere' in err

def test_a_learned_range(here, capsys):
    "The variance of a step is the network's, in training and in DDPM's steps."
    net = '{name: dit_tiny, size: 28, ch: 1, patch: 4, classes: 10, sigma: true}'
    Path('range.yaml').write_text(TINY.replace(re.search(r'model: .*', TINY)[0], f'model: {net}')+'process: {schedule: linear_beta, pred: eps, learned: {name: learned_range, steps: 50}}\n')
    assert ask('train range.yaml --out run --train.steps=2', capsys)==(0, ANY, ANY)
    from diffnb.cli import open_model
    from diffnb.recipes.images import process
    assert process(open_model('run').recipe).learned==(1., 256, 50)
    assert ask('sample run --n 4 --steps 3 --sampler ddpm --out x.npz', capsys)[0]==0
    with np.load('x.npz') as z: assert z['x'].shape==(4, 28, 28, 1)

def test_quickstart(here, capsys):
    "The quickstart, with a network for tests."
    small = ['--model.name=diffit_tiny', '--model.size=28', '--model.ch=1', '--train.steps=3', '--train.batch=8', '--train.log_every=1']
    small += ['--sample.n=20', '--sample.steps=2', '--eval.n=70']
    code, out, err = ask(['quickstart', *small], capsys)
    assert code==0, err
    for name in ('samples.png', 'strip.png', 'loss.png'): assert Image.open(f'quickstart/{name}').size[0]>200
    assert 'fid' in out and 'see quickstart' in out

def test_print_config(here, capsys):
    "What is printed is a recipe, and the same one; nothing is written."
    before = files(here)
    code, text, _ = ask('train tiny.yaml --print_config --train.lr.lr=3e-3', capsys)
    assert code==0 and files(here)==before and 'lr: 0.003' in text
    Path('full.yaml').write_text(text)
    assert ask('train full.yaml --print_config', capsys)[1]==text

def test_lists(capsys):
    code, out, _ = ask('list', capsys)
    assert code==0 and all(o in out for o in ('diffit_cifar10', 'heun', 'fashion_quickstart', 'cosine', 'kid'))
    assert 'diffit' not in ask('list sampler', capsys)[1]
    assert '193' not in ask('params diffit_tiny', capsys)[2] and 'parameters' in ask('params diffit_tiny', capsys)[1]
    assert ask('--version', capsys)[0]==0 and 'quickstart' in ask('', capsys)[1]

@pytest.mark.parametrize('command', ['train', 'sample', 'eval', 'export', 'distill', 'list', 'params', 'quickstart'])
def test_help(command, capsys):
    code, out, _ = ask([command, '--help'], capsys)
    assert code==0 and f'diffnb {command}' in out

@pytest.mark.parametrize('name', shipped())
def test_shipped(name, tmp_path):
    "Shipped recipes are consistent; with their files in place they would run."
    r = consistent(read(name))
    assert r.about and r.train.steps>0

def test_a_recipe_names_no_code(tmp_path):
    for bad in ('model: {class_path: os.system}', 'model: {name: os.system}', 'model: diffit_tiny\nsample: {sampler: {name: heun, clock: os.system}}',
                'model: diffit_tiny\nprocess: {schedule: {name: survival, schedule: {fn: os.system}}}', 'model: !!python/object/apply:os.system [ls]'):
        (tmp_path/'bad.yaml').write_text(bad)
        with pytest.raises(ValueError): check(read(tmp_path/'bad.yaml'))

def test_pipe(here):
    "A reader that leaves early is no mistake."
    code = 'import sys; from diffnb.cli import main; sys.exit(main())'
    p = subprocess.Popen([sys.executable, '-c', code, 'list'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
    p.stdout.close()
    assert p.wait(120)==0 and p.stderr.read()==b''

def test_in_a_shell(here):
    "As a process: the exit code, and nothing but the line."
    res = subprocess.run([sys.executable, '-c', 'import sys; from diffnb.cli import main; sys.exit(main())', 'train', 'tiny.yaml', '--train.steps=x'],
                         capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert (res.returncode, res.stdout, res.stderr) == (2, '', 'diffnb: train.steps: expected int, not x\n')

def test_a_second_process_changes_nothing(here, capsys):
    "What is refused has not written its own recipe over that of the run."
    assert ask('train tiny.yaml --out run', capsys)[0]==0
    hold = 'import fcntl, sys; f = open("run/lock", "a"); fcntl.lockf(f, fcntl.LOCK_EX); print("held", flush=True); sys.stdin.read()'
    with subprocess.Popen([sys.executable, '-c', hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as p:
        assert p.stdout.readline()=='held\n'
        was = files('run')
        code, out, err = ask('train tiny.yaml --out run --train.steps=6 --train.log_every=2', capsys)
        assert code==2 and 'another process trains in run' in err and files('run')==was
        p.stdin.close()
    assert ask('train tiny.yaml --out run --train.steps=6 --train.log_every=2', capsys)[0]==0 and files('run')!=was

def test_a_recipe_names_its_guide(here, capsys):
    "A constant guide is --w, to the bit; an interval without a time is no guidance; --w takes the place of a guide; a codec and a student have none."
    base = TINY.replace('sampler: euler}', 'sampler: euler, guide: {name: constant, w: 3.0}}')
    assert base!=TINY
    Path('guided.yaml').write_text(base)
    assert ask('train guided.yaml --out run', capsys)[0]==0
    def drawn(*words):
        code, out, err = ask(['sample', 'run', '--out', 'x.npz', *words], capsys)
        assert code==0, err
        with np.load('x.npz') as f: return f['x']
    guided = drawn()
    assert np.array_equal(drawn('--w=3'), guided) and not np.array_equal(drawn('--w=1'), guided)
    text = Path('run/recipe.yaml').read_text()
    def guide(o): Path('run/recipe.yaml').write_text(text.replace('guide:\n    name: constant\n    w: 3.0', f'guide: {o}'))
    guide('{name: interval, w: 3.0, low: 0.0, high: 1000.0, time: table}') # the network is told i, and all of it is within
    assert np.array_equal(drawn(), guided)
    guide('{name: interval, w: 3.0, low: 2.0, high: 3.0, time: table}')
    assert np.array_equal(drawn(), drawn('--w=1'))
    code, _, err = ask('distill run --out student', capsys)
    assert code==2 and 'a student takes over a weight' in err
    guide('{name: interval, time: tabel}')
    assert "did you mean 'table'" in ask('sample run --out y.npz', capsys)[2] and not Path('y.npz').exists()
