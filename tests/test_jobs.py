"Jobs for SLURM, run by bash with an `srun` and an `scontrol` that are not SLURM's: stopped, queued again, and ended as if never stopped."
import os, shlex, signal, subprocess, sys, time
from functools import partial
from pathlib import Path
import pytest
from conftest import ROOT
from diffnb.cli import main
from diffnb.store import load_tensors
from diffnb.train.loop import rows
from diffnb.train.parallel import forked

TINY = '''
model: {name: dit_tiny, size: 28, ch: 1, patch: 7, classes: 10}
train: {steps: 6, batch: 6, drop: 0.1, save_every: 100, log_every: 1, parallel: ddp, lr: {name: constant, lr: 1.0e-3}}
'''
# starts as many processes as the script asks for; hands signals on; its code is the highest of theirs
SRUN = '''#!/bin/bash
[ "$1" = --kill-on-bad-exit=1 ] || exit 64
shift
export SLURM_NTASKS=$(sed -n 's/#SBATCH --ntasks-per-node=//p' job.sh)
for i in $(seq 0 $((SLURM_NTASKS-1))); do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & ps="$ps $!"; done
trap 'kill -USR1 $ps' USR1
worst=0
for p in $ps; do
  wait $p; code=$?
  while kill -0 $p 2>/dev/null; do wait $p; code=$?; done
  [ $code -gt $worst ] && worst=$code
done
exit $worst
'''
SCONTROL = '#!/bin/bash\nif [ "$1" = show ]; then echo 127.0.0.1; echo 127.0.0.2; else echo "$@" >> asked; fi\n'
# the command; its first process stays in the fourth step until it has been told to stop
WAITS = f'''#!{sys.executable}
import os, sys, time
from contextlib import contextmanager
from pathlib import Path
import diffnb.train.loop as loop
from diffnb.cli import main
step, signals, held = loop.train_step, loop.signals, []
@contextmanager
def known():
    with signals() as caught: held.append(caught); yield caught
def waits(run, batch, scaler):
    if run.progress.step==3 and os.environ['RANK']=='0' and not Path('ready').exists():
        Path('ready').touch()
        while not held[-1]: time.sleep(.01)
    return step(run, batch, scaler)
loop.signals, loop.train_step = known, waits
sys.exit(main())
'''

@pytest.fixture
def here(tmp_path, monkeypatch):
    "A recipe, and programs that come first on the PATH."
    monkeypatch.chdir(tmp_path)
    Path('tiny.yaml').write_text(TINY)
    Path('bin').mkdir()
    for k,v in dict(srun=SRUN, scontrol=SCONTROL, diffnb=WAITS).items():
        (p := Path('bin')/k).write_text(v); p.chmod(0o755)
    env = {'PATH': f'{tmp_path}/bin:{os.environ["PATH"]}', 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'GLOO_SOCKET_IFNAME': 'lo',
           'TORCH_CPP_LOG_LEVEL': 'ERROR', 'SLURM_JOB_ID': str(os.getpid()), 'SLURM_JOB_NODELIST': 'a[1-2]'}
    for k,v in env.items(): monkeypatch.setenv(k, v)
    return tmp_path

def written(words, capsys, code=0):
    "What the command prints."
    capsys.readouterr()
    assert main(['slurm', *shlex.split(words)])==code
    return capsys.readouterr()

def test_stops_and_goes_on(here, capsys):
    "Two processes, told to stop in their fourth step: saved, queued again; the second job ends where an undisturbed run does, bit for bit."
    Path('job.sh').write_text(written('tiny.yaml --ranks 2 --out run', capsys).out)
    with open('said', 'wb') as out: p = subprocess.Popen(['bash', 'job.sh'], stdout=out, stderr=out)
    for _ in range(3000):
        if Path('ready').exists() or p.poll() is not None: break
        time.sleep(.05)
    p.send_signal(signal.SIGUSR1)
    assert p.wait(120)==138, Path('said').read_text()
    assert Path('asked').read_text()==f'requeue {os.getpid()}\n' and 'stopped by SIGUSR1 after step 4' in Path('said').read_text()
    assert Path('run/latest').read_text().strip()=='step-00000004'
    r = subprocess.run(['bash', 'job.sh'], capture_output=True, text=True, timeout=300)
    assert r.returncode==0 and 'run has 6 steps, 36 samples seen' in r.stdout, r.stderr
    assert Path('asked').read_text().count('requeue')==1 and [o['step'] for o in rows(Path('run'))]==[*range(1, 7)]
    assert forked(2, partial(main, 'train tiny.yaml --out calm'.split()))==[0, 0]
    for k in ('model', 'ema-ema', 'optim'):
        a, b = (load_tensors(Path(o)/'step-00000006'/f'{k}.safetensors')[0] for o in ('run', 'calm'))
        assert a.keys()==b.keys() and all((a[n]==b[n]).all() for n in a)

def test_mistakes_are_not_queued_again(here, capsys):
    "Whatever ends otherwise is final."
    for code in (0, 1, 2, 137):
        Path('bin/diffnb').write_text(f'#!/bin/bash\nexit {code}\n')
        Path('job.sh').write_text(written('tiny.yaml', capsys).out)
        assert subprocess.run(['bash', 'job.sh']).returncode==code and not Path('asked').exists()
    Path('bin/diffnb').write_text('#!/bin/bash\nkill -USR1 $$\n') # told before it could listen: nothing is lost
    assert subprocess.run(['bash', 'job.sh']).returncode==138 and Path('asked').exists()

def test_words(here, capsys):
    "What each process is told; what needs quotes keeps them; an array has a seed and a folder for each job."
    Path('bin/diffnb').write_text('#!/bin/bash\nprintf "%s|" $RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR "$@" >> words-$RANK\n')
    odd = '--train.lr={name: constant, lr: 0.5}'
    text = written(f"tiny.yaml --ranks 2 --nodes 1 --hours 3 --seeds 4 --out 'a run' --lines '--partition=long --gpus-per-task=1' '{odd}'", capsys).out
    Path('job.sh').write_text(text)
    assert subprocess.run(['bash', 'job.sh'], env={**os.environ, 'SLURM_ARRAY_TASK_ID': '3'}).returncode==0
    for i in '01': assert Path(f'words-{i}').read_text()==f'{i}|{i}|2|127.0.0.1|train|tiny.yaml|{odd}|--out|a run-3|--train.seed=3|'
    asked = [o for o in text.splitlines() if o.startswith('#SBATCH ')]
    for o in '--array=0-3 --time=3:00:00 --signal=B:USR1@120 --requeue --partition=long --gpus-per-task=1 --ntasks-per-node=2'.split(): assert f'#SBATCH {o}' in asked

WRONG = {'fashon': 'no recipe is called', 'tiny.yaml --ranks 0': 'ranks must be at least 1, not 0', 'tiny.yaml --seeds 0': 'seeds must be at least 1, not 0',
         'tiny.yaml --hours 0': 'hours must be at least 1', 'tiny.yaml --train.stepz=3': 'no flag --train.stepz',
         'tiny.yaml --nodes 2 --train.parallel=null': '2 processes would each train alone'}
@pytest.mark.parametrize('words', WRONG)
def test_refused(here, capsys, words):
    got = written(words, capsys, 2)
    assert WRONG[words] in got.err and got.out=='' and got.err.count('\n')==1
