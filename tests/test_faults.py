"Kills at the write points of the commands, and what the disk refuses: nothing is lost, nothing half written is read."
import errno, multiprocessing, os, shutil, signal, time
from pathlib import Path
import pytest, torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter as Loader
import crash
from crash import COMMANDS, RECIPE, Session, killed_at, one_line, refused_at, run, state, torn_at
from diffnb.cli import main
from diffnb.rng import from_workers
from diffnb.saving import Damaged, add_lines, load_arrays, unpacked
from diffnb.store import newest
from diffnb.train.loop import Log, rows

@pytest.fixture(scope='module')
def session(tmp_path_factory):
    "An undisturbed run, kept in memory where that is possible: it waits for the disk some hundred times."
    return Session(tmp_path_factory.mktemp('faults').resolve()/'session')

@pytest.mark.slow
@pytest.mark.parametrize('name,every', [('train', 40), ('sample', 2), ('eval', 1)])
def test_killed_at_write_points(session, name, every): assert killed_at(session, name, every)>0

@pytest.mark.slow
def test_killed_at_every_write_point(session): assert killed_at(session, 'train')>100

@pytest.mark.slow
@pytest.mark.parametrize('code', [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize('name', crash.COMMANDS)
def test_refused_at_every_write_point(session, name, code): refused_at(session, name, code)

@pytest.mark.slow
@pytest.mark.parametrize('name', crash.COMMANDS)
def test_killed_in_the_middle_of_a_write(session, name): torn_at(session, name, [10, 100, 1000, 10_000, 100_000])

def test_a_line_that_was_cut_off_spoils_no_other(tmp_path):
    p = tmp_path/'eval.jsonl'
    add_lines(p, ['{"a": 1}', '{"a": 2}'])
    p.write_bytes(p.read_bytes()[:-4])
    add_lines(p, ['{"a": 3}'])
    assert rows(p)==[{'a': 1}, {'a': 3}]

def test_a_log_that_cannot_be_written_is_written_later(tmp_path, monkeypatch):
    "A full disk must not end a run for the sake of a line, least of all for the line that says that it is full."
    import diffnb.train.loop as loop
    log, full = Log(tmp_path, 10, 0, False), [True]
    def refuse(path, lines):
        if full: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        add_lines(path, lines)
    monkeypatch.setattr(loop, 'add_lines', refuse)
    log.say('one'); log.add('log.jsonl', '{"step": 1}')
    full.clear()
    log.say('two'); log.add('log.jsonl', '{"step": 2}'); log.add('log.jsonl', '{"step": 3}')
    assert [o['step'] for o in rows(tmp_path)]==[1, 2, 3] and len((tmp_path/'log.txt').read_text().splitlines())==2

def test_archives_that_have_changed(tmp_path):
    import gzip, numpy as np
    np.savez_compressed(tmp_path/'a.npz', x=np.arange(1000))
    (tmp_path/'a.gz').write_bytes(gzip.compress(b'hello'*100))
    for name,reads in (('a.npz', load_arrays), ('a.gz', unpacked)):
        good = (tmp_path/name).read_bytes()
        k = len(good)//2
        for bad in (good[:-1], good[:len(good)//2], good[:k]+bytes([good[k]^255])+good[k+1:]):
            (tmp_path/name).write_bytes(bad)
            with pytest.raises(Damaged, match=name): reads(tmp_path/name)

# --- workers ---
class Deadly:
    "Batches, one of which ends the process that makes it: once, or as long as the file `mark` is there."
    def __init__(self, mark, once): self.mark, self.once = mark, once
    def __getitem__(self, idx):
        if 12 in idx and self.mark.exists():
            if self.once: self.mark.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return idx*2

@pytest.mark.parametrize('workers', [1, 2])
def test_a_worker_that_dies(tmp_path, capsys, monkeypatch, workers):
    "Its batches are made again. If that is of no use, the error says what to do."
    monkeypatch.setattr(Loader._try_get_data, '__defaults__', (.2,)) # torch looks for the dead each 5 s
    heard, todo, mark = signal.getsignal(signal.SIGCHLD), torch.arange(30).split(3), tmp_path/'mark'
    mark.touch()
    assert torch.equal(torch.cat([*from_workers(Deadly(mark, True), iter(todo), workers)]), torch.arange(30)*2)
    assert capsys.readouterr().err.count('has died') and signal.getsignal(signal.SIGCHLD) in (heard, signal.SIG_DFL)
    mark.touch()
    with pytest.raises(RuntimeError, match='at or after sample .* use fewer workers'): [*from_workers(Deadly(mark, False), iter(todo), workers)]

def in_step(k, do):
    "What a fork is to do first: in the middle of step k something is to happen, to a process group of its own."
    def before():
        import diffnb.train.loop as loop
        os.setsid()
        real = loop.gradient
        def gradient(run, *args):
            if run.progress.step==k: do()
            return real(run, *args)
        loop.gradient = gradient
    return before

TO_ALL = {'SIGTERM': 143, 'SIGUSR1': 138} # what ends a job tells all its processes -> the exit code
WORKERS = 'train tiny.yaml --out run --data.workers=2 --train.steps=9 --train.save_every=9'

@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    root = tmp_path_factory.mktemp('workers').resolve()/'run'
    root.mkdir()
    return ended(root)

def ended(root):
    "The last checkpoint, once the command has come to its end."
    crash.warm()
    (root/'tiny.yaml').write_text(RECIPE)
    r = run(root, WORKERS)
    assert r.code==0, r.err
    return state(root/'run'/'step-00000009')

@pytest.mark.parametrize('name', TO_ALL)
def test_a_signal_to_trainer_and_workers(tmp_path, undisturbed, name):
    "The workers die of it. The trainer saves at the end of the step, and the same command goes on."
    root = tmp_path.resolve()/'run'
    root.mkdir(); (root/'tiny.yaml').write_text(RECIPE)
    r = run(root, WORKERS, in_step(3, lambda: os.killpg(0, getattr(signal, name))))
    assert r.code==TO_ALL[name] and 'the same command goes on' in r.out and crash.step(root)==4, r.err
    assert ended(root)==undisturbed

def test_a_worker_that_dies_in_training(tmp_path, undisturbed):
    root = tmp_path.resolve()/'run'
    root.mkdir(); (root/'tiny.yaml').write_text(RECIPE)
    r = run(root, WORKERS, in_step(1, lambda: [p.kill() for p in multiprocessing.active_children()]))
    assert r.code==0 and 'has died' in r.err, r.err
    assert state(root/'run'/'step-00000009')==undisturbed

# --- files of a run ---
@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "A run of six steps with checkpoints at 4 and 6, for copies."
    root = tmp_path_factory.mktemp('trained').resolve()/'run'
    root.mkdir(); (root/'tiny.yaml').write_text(RECIPE)
    crash.warm()
    assert run(root, COMMANDS['train']).code==0
    return root

@pytest.fixture
def again(trained, tmp_path): return Path(shutil.copytree(trained, tmp_path.resolve()/'again'))

def cut(raw): return raw[:raw.index('process:')]
RECIPES = {'gone': None, 'empty': lambda raw: '', 'cut': cut, 'no YAML': lambda raw: raw.replace(': ', ':: [', 1), 'no text': lambda raw: '\0'+raw,
           'altered': lambda raw: raw.replace('pred: flow', 'pred: x0')}

@pytest.mark.parametrize('name', RECIPES)
def test_a_damaged_recipe_in_a_run(trained, again, name):
    "Nothing is sampled or measured by another recipe than the run's; training has its own, and puts the file right."
    path = again/'run'/'recipe.yaml'
    good = path.read_text()
    if RECIPES[name]: path.write_text(RECIPES[name](good))
    else: path.unlink()
    for o in ('sample', 'eval'): assert 'recipe' in one_line(run(again, COMMANDS[o]))
    assert not (again/'x.npz').exists() and not (again/'run'/'eval.jsonl').exists()
    assert run(again, COMMANDS['train']).code==0 and path.read_text()==good and state(again)==state(trained)

def test_a_clock_that_goes_backwards(trained, again):
    "Which checkpoint is newest, and which are removed, is a matter of numbers, whatever clock and dates of files say."
    def back():
        now = iter(range(2*10**9, 0, -10**6)) # a fortnight at each look
        time.time = lambda: next(now)
    words = f'{COMMANDS["train"]} --train.steps=8'
    far = Path(shutil.copytree(again, again.with_name('far')))
    assert run(far, words).code==0
    for k,when in (('step-00000004', 4*10**9), ('step-00000006', 10), ('latest', 10), ('log.jsonl', 4*10**9)):
        for p in (again/'run'/k, *(again/'run'/k).rglob('*')): os.utime(p, (when, when))
    r = run(again, words, back)
    assert r.code==0, r.err
    assert state(again)==state(far) and sorted(p.name for p in (again/'run').glob('step-*'))==['step-00000006', 'step-00000008']
    assert 'going on from step-00000006' in (again/'run'/'log.txt').read_text()

@pytest.mark.parametrize('name', ['sample', 'eval'])
def test_a_checkpoint_that_is_removed_before_it_is_read(again, name):
    "The run has gone on meanwhile: the next one is taken."
    def meanwhile():
        import diffnb.cli as cli
        real = cli.load_weights
        def late(where, *args):
            cli.load_weights = real
            assert where.name=='step-00000006' and main(f'{COMMANDS["train"]} --train.steps=10'.split())==0 and not where.exists()
            return real(where, *args)
        cli.load_weights = late
    r = run(again, COMMANDS[name], meanwhile)
    assert r.code==0, r.err
    was = state(again)
    (again/'x.npz').unlink(missing_ok=True)
    assert run(again, COMMANDS[name]).code==0 and state(again)==was # as from the newest, which is the only one it can be
    if name=='eval': assert {o['checkpoint'] for o in rows(again/'run'/'eval.jsonl')}=={'step-00000010'}

def test_all_are_removed_while_one_looks(again, monkeypatch):
    "Between the look at the folder and the look at its checkpoints."
    import diffnb.store as store
    real = store.check_folder
    def late(path):
        monkeypatch.setattr(store, 'check_folder', real)
        for k in (4, 6): (again/'run'/f'step-{k:08d}').rename(again/'run'/f'step-{k+10:08d}')
        return real(path)
    monkeypatch.setattr(store, 'check_folder', late)
    assert newest(again/'run')[0].name=='step-00000016'
