"""`diffnb train`, `sample` and `eval`, killed with -9 at random: nothing is lost, and all ends as if nothing had happened.

`python tests/kills.py --n 100` counts what happens, shows what should not, and writes nbs/results/kills.json."""
import argparse, itertools, os, random, shutil, signal, sys, tempfile, time
from collections import Counter
from pathlib import Path
import torch
from crash import COMMANDS, RECIPE, Session, command, die_at, hidden, points, run, spawned, step, whole
from diffnb.bench import keep

ROOT = Path(__file__).resolve().parents[1]
WITH_A_WORKER = RECIPE + 'data: {workers: 1}\n' # which a killed run leaves behind
HOW = ('moment', 'write') # at any moment; before a change of a file, which is where kills hurt

def killed_at_a_moment(root, words, seconds):
    pid = spawned(command(root, words), root.with_name('said'))
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

class Kills:
    "A session whose commands are killed."
    def __init__(self, root, seed=0):
        self.session, self.rnd, self.far = Session(root, WITH_A_WORKER), random.Random(seed), {}
        (root/'said').mkdir()
        for k,words in COMMANDS.items():
            n, t = len(points(self.session.fresh(k), words)), time.monotonic()
            run(self.session.fresh(k), words)
            self.far[k] = n, time.monotonic()-t
    def kill(self, root, name, how):
        "Kill a command once. False: it had ended before."
        n, seconds = self.far[name]
        if how=='moment': code = killed_at_a_moment(root, COMMANDS[name], self.rnd.random()*seconds)
        else: code = run(root, COMMANDS[name], die_at(root, self.rnd.randrange(n))).code
        assert code in (0, -signal.SIGKILL), f'{name} ended with {code}'
        return code!=0
    def one(self, name, how, most, seen):
        "Kill a command up to `most` times in a row, then let it end: it ends as the undisturbed one did."
        s = self.session
        root = s.fresh(name)
        for _ in range(self.rnd.randint(1, min(3, most))):
            was = step(root)
            if not self.kill(root, name, how): break
            seen[how] += 1
            seen['in a write'] += bool(hidden(root))
            assert step(root)>=was, f'step {was} was complete, and now {step(root)} is the newest'
            whole(root, s.before[name], s.after[name])
        s.again(name)
    def all(self, n):
        "Kill n times: a row for each command, and what should not be."
        seen, faults = {k: Counter() for k in COMMANDS}, []
        def killed(k): return sum(seen[k][o] for o in HOW)
        while (left := n-sum(map(killed, COMMANDS)))>0 and len(faults)<20:
            how, name = min(itertools.product(HOW, COMMANDS), key=lambda o: seen[o[1]][o[0]]) # all ways equally often
            try: self.one(name, how, left, seen[name])
            except AssertionError as e: seen[name]['fault'] += 1; faults.append(f'{name}, {how}: {e!s:.500}')
        return [dict(what=k, kills=killed(k), **{o: c[o] for o in (*HOW, 'in a write', 'fault')}) for k,c in seen.items()], faults

if __name__=='__main__':
    p = argparse.ArgumentParser()
    p.add_argument('--n', type=int, default=10)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--out', help='a JSON file')
    a = p.parse_args()
    torch.set_num_threads(1)
    work = Path(tempfile.mkdtemp(dir='/dev/shm' if os.path.isdir('/dev/shm') else None)).resolve()
    try: rows, faults = Kills(work/'kills', a.seed).all(a.n)
    finally: shutil.rmtree(work)
    for o in faults: print(o)
    for o in rows: print(o)
    if a.out and not faults: keep(Path(a.out).stem, rows, f'python tests/kills.py --n {a.n} --seed {a.seed}', ('safetensors', 'diffnb'), ROOT/Path(a.out).parent)
    sys.exit(bool(faults))
