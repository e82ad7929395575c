"""The command line in processes of its own that die, or are refused a file operation, wherever one likes."""
import contextlib, io, json, multiprocessing.util, os, re, resource, shutil, signal, sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
import torch # heavy imports once: all else runs in forks
from diffnb.cli import main
from diffnb.core import presets
from diffnb.store import check_folder, leftovers, newest, sound
from diffnb.train.loop import rows

RECIPE = '''
model: {name: dit_tiny, size: 28, ch: 1, patch: 7, classes: 10}
train: {steps: 6, batch: 4, drop: 0.1, save_every: 2, log_every: 1, sample_every: 3, lr: {name: constant, lr: 1.0e-3}}
sample: {n: 10, steps: 2, sampler: euler}
eval: {n: 66, metrics: [kid]}
'''
COMMANDS = dict(train='train tiny.yaml --out run', sample='sample run --out x.npz', eval='eval run')

def warm():
    "Import what the commands import when they are first used."
    presets()
    with contextlib.redirect_stdout(io.StringIO()): main(['list', 'sampler'])

# --- processes ---
def forked(work, folder, name='out'):
    "Run in a fork: `(code, out, err)`; the code is minus the signal's number if one ended it."
    folder.mkdir(parents=True, exist_ok=True)
    pid = spawned(work, folder, name)
    status = os.waitpid(pid, 0)[1]
    code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    return SimpleNamespace(code=code, out=(folder/f'{name}.1').read_text(), err=(folder/f'{name}.2').read_text())

def spawned(work, folder, name='out'):
    "Start a fork; its streams go into files."
    pid = os.fork()
    if pid: return pid
    code = 70
    try:
        multiprocessing.util._run_after_forkers() # what a Process does: else the parent's sockets are taken for one's own
        for fd in (1, 2): os.dup2(os.open(folder/f'{name}.{fd}', os.O_CREAT|os.O_WRONLY|os.O_TRUNC), fd)
        sys.stdout, sys.stderr = open(1, 'w', closefd=False), open(2, 'w', closefd=False)
        torch.set_num_threads(1)
        code = work()
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        try: sys.stdout.flush(); sys.stderr.flush()
        finally: os._exit(code)

def command(root, words, before=lambda: None):
    "What a fork is to do: a command, with the root as its folder."
    def work():
        os.chdir(root)
        before()
        return main(words.split())
    return work

def run(root, words, before=lambda: None): return forked(command(root, words, before), root.with_name(f'{root.name}-said'))

# --- write points ---
MOVES = {'os.rename', 'os.remove', 'os.rmdir', 'os.mkdir', 'os.truncate'}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

def watch(root, act):
    "From now on `act(k, what)` is called before the k-th change of a file below the root. It cannot be undone."
    count, real = [0], os.fsync
    def seen(what): count[0] += 1; act(count[0]-1, what)
    def below(path): return os.path.abspath(os.fsdecode(path)).startswith(str(root))
    def hook(event, args):
        if event=='open' and isinstance(args[0], str | bytes):
            if args[2] & WRITES and below(args[0]): seen(f'open {os.path.basename(os.fsdecode(args[0]))}')
        elif event in MOVES and (any(isinstance(o, int) and o>=0 for o in args[1:]) or below(args[0])): seen(event)
    def fsync(fd): seen('fsync'); real(fd)
    os.fsync = fsync
    sys.addaudithook(hook)

def points(root, words):
    "The write points of a command, by what is done there."
    names = root.with_name('points')
    with open(names, 'w') as f:
        fd = f.fileno()
        r = run(root, words, lambda: watch(root, lambda k, what: os.write(fd, f'{what}\n'.encode())))
    assert r.code==0, r.err
    return names.read_text().splitlines()

def die_at(root, n):
    def act(k, what):
        if k==n: os.kill(os.getpid(), signal.SIGKILL)
    return lambda: watch(root, act)

def refuse_at(root, n, code, lasting):
    "From the n-th point on the disk refuses, for once or for good; taking away is allowed."
    def act(k, what):
        if what in ('os.remove', 'os.rmdir'): return
        if k==n or lasting and k>n: raise OSError(code, os.strerror(code))
    return lambda: watch(root, act)

def torn(size):
    "The kernel ends the process in the middle of the write that makes a file larger than this."
    def before():
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return before

# --- what is in a folder ---
def content(path):
    "A file's bytes; of a log what does not depend on the clock."
    if path.name=='log.jsonl': return [{k: v for k,v in o.items() if k!='images_per_s'} for o in rows(path)]
    if path.name=='eval.jsonl': return list({json.dumps(o): o for o in rows(path)}) # measured again is measured twice
    return path.read_bytes()

def state(root):
    "What a user sees below a folder."
    files = (p for p in sorted(root.rglob('*')) if p.is_file() and p.name not in ('lock', 'log.txt'))
    return {str(p.relative_to(root)): content(p) for p in files if not any(re.match(r'\.(tmp|old|del)-', o) for o in p.relative_to(root).parts)}

def hidden(root): return [p for d in (root, *filter(Path.is_dir, root.iterdir())) for p,*_ in leftovers(d)]

def step(root):
    "The number of the newest whole checkpoint."
    path, _ = newest(root/'run') if (root/'run').exists() else (None, [])
    if path: check_folder(path)
    return int(path.name.split('-')[-1]) if path else 0

def differs(a, b): return sorted(k for k in a.keys() | b.keys() if a.get(k)!=b.get(k))

def whole(root, before, after):
    "Nothing that can be seen is half written: it is as it was, as it will be, or a complete checkpoint on the way."
    for k,v in state(root).items():
        if re.match(r'run/step-\d+/', k): assert sound(root/k.split('/step-')[0]/k.split('/')[1], check_folder), k
        elif k=='run/latest': assert sound(root/'run'/v.decode().strip()), v
        elif k.endswith('.jsonl'): assert v==before.get(k, v) or v==after[k][:len(v)], f'{k}: {v}'
        else: assert v in (before.get(k), after.get(k)), f'{k} is neither as before nor as after'

class Session:
    "An undisturbed run of the three commands, and copies of what stood before and after each."
    def __init__(self, root, recipe=RECIPE, commands=COMMANDS):
        warm()
        self.root, self.commands, self.before, self.after = root, commands, {}, {}
        (root/'now').mkdir(parents=True)
        (root/'now'/'tiny.yaml').write_text(recipe)
        for name,words in commands.items():
            shutil.copytree(root/'now', root/f'before-{name}')
            r = run(root/'now', words)
            assert r.code==0, r.err
            self.before[name], self.after[name] = state(root/f'before-{name}'), state(root/'now')
    def fresh(self, name):
        "The folder as it stood before a command."
        shutil.rmtree(self.root/'now', ignore_errors=True)
        return Path(shutil.copytree(self.root/f'before-{name}', self.root/'now'))
    def again(self, name):
        "The same command without a fault ends as the undisturbed one did."
        r, now = run(self.root/'now', self.commands[name]), self.root/'now'
        assert r.code==0, r.err
        assert state(now)==self.after[name], differs(state(now), self.after[name])
        assert not hidden(now), hidden(now)

def one_line(r):
    "It is an error that says what is wrong, in one line."
    assert r.code==2 and 'Traceback' not in r.err, r.err
    said = [o for o in r.err.splitlines() if o.startswith('diffnb: ')]
    assert len(said)==1 and len(said[0])<500, r.err
    return said[0]

# --- campaigns ---
def killed_at(session, name, every=1, first=0):
    "SIGKILL at write points of a command."
    n = len(points(session.fresh(name), session.commands[name]))
    for k in range(first, n, every):
        root = session.fresh(name)
        was = step(root)
        assert run(root, session.commands[name], die_at(root, k)).code==-signal.SIGKILL
        assert step(root)>=was
        whole(root, session.before[name], session.after[name])
        session.again(name)
    return len(range(first, n, every))

def refused_at(session, name, code, every=1, first=0):
    "A disk that refuses at write points: the command fails in one line, or does without and ends well."
    n, seen = len(points(session.fresh(name), session.commands[name])), Counter()
    for k in range(first, n, every):
        root, lasting = session.fresh(name), bool(k%2)
        r = run(root, session.commands[name], refuse_at(root, k, code, lasting))
        if r.code: assert os.strerror(code) in one_line(r), r.err
        whole(root, session.before[name], session.after[name])
        session.again(name)
        seen['refused' if r.code else 'went on'] += 1
    return seen

def torn_at(session, name, sizes):
    "A kill in the middle of a write."
    died = 0
    for size in sizes:
        root = session.fresh(name)
        r = run(root, session.commands[name], torn(size))
        died += r.code==-signal.SIGXFSZ
        assert r.code in (0, -signal.SIGXFSZ), r.err
        whole(root, session.before[name], session.after[name])
        session.again(name)
    return died
