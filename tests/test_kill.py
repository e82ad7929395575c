"Runs that are killed with -9 at random moments lose nothing older than the last complete checkpoint, and the same command goes on."
import multiprocessing, random, re, signal, subprocess, sys, time
from functools import partial
from pathlib import Path
import pytest, torch
from torch import nn
from diffnb.bench import kept
from diffnb.core import Denoiser, Feats
from diffnb.data.images import Images, batches
from diffnb.process.gaussian import Gaussian
from diffnb.rng import Rng
from diffnb.store import check_folder, newest
from diffnb.train.ema import halflife
from diffnb.train.loop import fit
from diffnb.train.task import DiffusionTask, constant
from crash import COMMANDS

HERE = Path(__file__).parent

class Tiny(Denoiser):
    def __init__(self):
        super().__init__()
        self.inp, self.out = nn.Linear(16, 256), nn.Linear(256, 16)
    def features(self, x, net_t, **cond): return Feats(torch.relu(self.inp(x.flatten(1))), size=x.shape)
    def head(self, feats): return self.out(feats.h).view(feats.size)

def train(folder, steps):
    "What the same command does each time."
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = Images(torch.arange(40*16).remainder(256).view(40, 1, 4, 4).to(torch.uint8))
    task = DiffusionTask(Tiny(), Gaussian('straight', 'flow'), lr=constant(1e-3))
    data = partial(batches, images, 8, Rng(0))
    fit(task, data, steps, folder, averages=dict(ema=halflife(100)), save_every=3, log_every=3, bar=False)

def start(folder, steps):
    p = multiprocessing.get_context('fork').Process(target=train, args=(folder, steps)) # as a new process, without the imports
    p.start()
    return p

def finish(folder, steps):
    p = start(folder, steps)
    p.join(300)
    assert p.exitcode==0

def latest(run): return (run/'latest').read_text() if (run/'latest').exists() else None

def wait_for_a_step(p, run):
    "The interesting moments are after the first save of this process."
    was, limit = latest(run), time.monotonic()+60
    while p.is_alive() and latest(run)==was and time.monotonic()<limit: time.sleep(.002)

def campaign(tmp_path, kills, seed):
    "Kill a run again and again, before its first save or soon after one; then let it finish, and compare."
    rnd, run, before, died, inside = random.Random(seed), tmp_path/'killed', 0, 0, 0
    for k in range(kills):
        p = start(run, 10**6)
        if k%5: wait_for_a_step(p, run)
        time.sleep(rnd.random()*.1)
        p.kill()
        p.join()
        died += p.exitcode==-signal.SIGKILL
        inside += bool(list(run.glob('.tmp-*'))) # in the middle of a save
        path, _ = newest(run) if run.exists() else (None, [])
        step = int(path.name.split('-')[1]) if path else 0
        assert step>=before, f'step {before} was complete, and now {step} is the newest'
        if path: check_folder(path)
        before = step
    assert died==kills and before>0
    end = before+5
    finish(run, end)
    finish(tmp_path/'whole', end)
    got, want = ({f.name: f.read_bytes() for f in newest(o)[0].glob('*.safetensors')} for o in (run, tmp_path/'whole'))
    assert got==want, 'the killed run ended with other bits'
    assert not list(run.glob('.tmp-*')), 'leftovers of dead writers'
    return inside

def test_kill_ten(tmp_path): campaign(tmp_path, 10, 0)

@pytest.mark.slow
def test_kill_thirty(tmp_path): assert campaign(tmp_path, 30, 1)>0 # some died while they saved

# --- the commands ---
def test_train_sample_and_eval_killed_ten_times():
    "What is seen after each kill is whole, and in the end all files are those of the undisturbed run, bit for bit."
    r = subprocess.run([sys.executable, HERE/'kills.py', '--n', '10'], capture_output=True, text=True)
    assert r.returncode==0, r.stdout[-3000:]+r.stderr[-3000:]
    assert sum(int(o) for o in re.findall(r"'kills': (\d+)", r.stdout))==10

def test_the_hundred_kills_that_were_counted():
    page = kept('kills', HERE.parent/'nbs'/'results')
    rows = {r['what']: r for r in page['rows']}
    assert page['command'].startswith('python tests/kills.py') and rows.keys()==COMMANDS.keys()
    assert sum(r['kills'] for r in rows.values())>=100 and all(r['kills']>=30 and r['fault']==0 for r in rows.values())
    assert all(r['moment']+r['write']==r['kills'] for r in rows.values()) and sum(r['in a write'] for r in rows.values())>=10
