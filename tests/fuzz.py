"""Recipes, JSON files and safetensors headers, mutated: a clear error or the right result, and nothing else.

`python tests/fuzz.py --n 10000` counts what happens, shows what should not, and writes nbs/results/fuzz.json."""
import argparse, contextlib, copy, io, json, multiprocessing, os, random, resource, shutil, signal, sys, tempfile, traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
import torch, yaml
from diffnb.bench import keep
from diffnb.cli import as_yaml, main
from diffnb.core import create, presets
from diffnb.recipes import check, read, shipped
from diffnb.rng import Rng
from diffnb.store import check_folder, digest, load_tensors, save_tensors
from diffnb.train.checkpoint import Progress, load_checkpoint, load_denoiser, save_checkpoint
from diffnb.train.ema import EMA, halflife

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 40 # of the processor, that a case may take: a recipe's network is described, by 50,000 modules at most
SLACK = dict(recipe=256*2**20, json=64*2**20, header=64*2**20) # memory beside twice the file; the description counts
KINDS = ('recipe', 'json', 'header')
RECIPES = ['''model: {name: dit_tiny, size: 28, ch: 1, patch: 7, classes: 10}
data: {set: {name: fashion_mnist, split: train}, transforms: [floats, {name: hflip, p: 0.5}], workers: 0}
process: {schedule: {name: linear_beta}, pred: eps, weight: {name: min_snr, gamma: 5.0}}
train: {steps: 6, batch: 4, drop: 0.1, save_every: 2, lr: {name: cosine, lr: 1.0e-3, warmup: 8}, averages: {ema: halflife}}
sample: {n: 10, steps: 2, sampler: euler, grid: uniform}
eval: {n: 66, metrics: [kid]}
''']

# --- mutations ---
NASTY = [0, -1, 1, 3, 2**31, 2**63, 10**30, -10**9, 1e308, 1e-308, float('nan'), float('inf'), float('-inf'), -0., .5, '', ' ', 'null',
         'nan', '\x00', 'a'*3000, '𝔘𝔫𝔦 ́\u202e', '../../etc/passwd', '/', '${HOME}', '{0.__class__}', 'os.system', '%s%n', None, True,
         False, [], {}, [[]], [None], {'': None}, {'name': None}, {'a': {'b': []}}, [1, 'a', None], 'F4', 'torch.float32', '1_0', '0x1f']
SPECIALS = [b'', b'\xff\xfe', b'\xef\xbb\xbfmodel: dit_tiny\n', b'[' * 20000, b'{"a":' * 20000, b'- ' * 5000, b'&a [*a]', b'a: &a {b: *a}\n',
            b'a: &a [x,x,x,x,x,x,x,x,x]\n' + b''.join(b'%c: &%c [*%c,*%c,*%c,*%c,*%c,*%c,*%c,*%c,*%c]\n' % ((98+i,)*2 + (97+i,)*9)
                                                     for i in range(20)) + b'model: *u\n',
            b'model: &a {name: dit_tiny}\ntrain: *a\n', b'<<: {model: dit_tiny}\n', b'model: !!python/object/apply:os.system [ls]\n',
            b'!!binary aGVsbG8=', b'model: !!set {a, b}\n', b'--- a\n--- b\n', b'? [a, b]\n: c\n', b'model: 2020-01-01\n',
            b'model: dit_tiny\ntrain: {steps: 1:30:00}\n', b'1: 2\nmodel: dit_tiny\n', b'null: 1\nmodel: dit_tiny\n', b'model: dit_tiny\nmodel: x\n',
            b'model: dit_tiny\ntrain: {lr: ' + b'9'*5000 + b'}\n', b'model: dit_tiny\nabout: "' + b'\\u2028'*100 + b'"\n', b'\t\n', b'%YAML 9.9\n---\n',
            b'model: dit_tiny\ntrain: {steps: 1e999}\n', b'model: {name: dit_tiny, size: 99999999}\n', b'NaN', b'"\\ud800"', b'{"a":1,"a":2}',
            b'model: {name: dit_tiny, classes: 9999999999}\n', b'model: dit_tiny\nprocess: {schedule: {name: linear_beta, T: 99999999999}}\n']

def places(tree, at=()):
    "Every place in a tree."
    out = [at] if at else []
    if len(at)>20: return out
    for k,v in (tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()): out += places(v, (*at, k))
    return out

def nested(rnd):
    v = rnd.choice(NASTY)
    for _ in range(rnd.choice([1, 5, 50, 2000])): v = [v] if rnd.random()<.5 else {'name': v}
    return v

def typo(rnd, k):
    if not isinstance(k, str) or not k: return 'x'
    i = rnd.randrange(len(k))
    return rnd.choice([k[:i]+k[i+1:], k[:i]+rnd.choice('aZ_.é0')+k[i:], k.upper(), k+' ', k[::-1]])

def bent(rnd, tree):
    "One change at one place."
    try: tree = copy.deepcopy(tree)
    except RecursionError: return tree
    ps = places(tree)
    if not ps: return rnd.choice(NASTY)
    *up, k = rnd.choice(ps)
    at = tree
    for o in up: at = at[o]
    what, v = rnd.choice(['nasty', 'nasty', 'nasty', 'drop', 'name', 'wrap', 'swap', 'deep', 'more', 'number']), at[k]
    if what=='drop': del at[k]
    elif what=='name' and isinstance(at, dict): at[typo(rnd, k)] = at.pop(k)
    elif what=='wrap': at[k] = rnd.choice([[v], {'name': v}, {k: v}, str(v)])
    elif what=='swap':
        *up2, k2 = rnd.choice(ps)
        there = tree
        for o in up2: there = there[o]
        at[k] = copy.deepcopy(there[k2])
    elif what=='deep': at[k] = nested(rnd)
    elif what=='more' and isinstance(v, list): at[k] = v*rnd.choice([2, 1000])
    elif what=='more' and isinstance(v, dict): at[k] = {**v, **{f'k{i}': i for i in range(rnd.choice([1, 1000]))}}
    elif isinstance(v, int | float) and not isinstance(v, bool): at[k] = rnd.choice([-v, v*10**6, v+1, v/3, v*1e300, str(v), -10**18, v*2**40])
    elif isinstance(v, str) and v: at[k] = typo(rnd, v)
    else: at[k] = rnd.choice(NASTY)
    return tree

def torn(rnd, raw):
    "Bytes changed without regard for what they mean."
    raw = bytearray(raw)
    for _ in range(rnd.choice([1, 1, 2, 8])):
        i, what = rnd.randrange(len(raw)+1), rnd.choice(['flip', 'cut', 'drop', 'add', 'again', 'bit'])
        if what=='cut' and rnd.random()<.5: del raw[i:]
        elif what=='flip' and i<len(raw): raw[i] = rnd.randrange(256)
        elif what=='bit' and i<len(raw): raw[i] ^= 1<<rnd.randrange(8)
        elif what=='drop': del raw[i:i+rnd.choice([1, 4, 20])]
        elif what=='add': raw[i:i] = rnd.choice([b'\0', b'[', b'{', b'}', b'"', b':', b'\n', b'\t', b'&a ', b'*a ', b'!!x ', b'-', b'9'*30, b'\xc3'])
        elif what=='again': raw[i:i] = raw[max(0, i-rnd.choice([3, 20, 60])):i]
    return bytes(raw)

def dumped(tree, how):
    "A tree as YAML or JSON; what cannot be written is a tree no file can hold."
    try: return (json.dumps(tree) if how=='json' else yaml.safe_dump(tree, allow_unicode=True)).encode()
    except (RecursionError, yaml.YAMLError, UnicodeError): return b'['*5000

def mutated(rnd, raw, load, how):
    "A file with something wrong with it, or nearly right."
    if rnd.random()<.08: return rnd.choice(SPECIALS)
    if rnd.random()<.35: return torn(rnd, raw)
    tree = load(raw)
    for _ in range(rnd.choice([1, 1, 1, 2, 4])):
        if not isinstance(tree, dict | list): break
        tree = bent(rnd, tree)
    return dumped(tree, how)

# --- what is tried ---
class Wrong(Exception):
    "What must not happen."

def accept(f):
    "What a reader may do: return something, or say what is wrong."
    try: return 'read', f()
    except (ValueError, FileNotFoundError) as e:
        if not str(e): raise Wrong(f'{type(e).__name__} without a word') from e
        return 'refused', str(e)

def try_recipe(rnd, work):
    "Through the command line: the complete recipe, or one line. What is accepted is accepted again, and is the same."
    path = work/'mutated.yaml'
    path.write_bytes(mutated(rnd, rnd.choice(RECIPES).encode(), yaml.safe_load, 'yaml'))
    size = path.stat().st_size
    how, r = accept(lambda: check(read(path)))
    if rnd.random()<.2 or how=='read':
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): code = main(['train', str(path), '--print_config'])
        if code!=(0 if how=='read' else 2): raise Wrong(f'exit code {code}: {err.getvalue()[:300]}')
        if code and (err.getvalue().count('\n')!=1 or not err.getvalue().startswith('diffnb: ') or out.getvalue() or len(err.getvalue())>1100): raise Wrong(f'not one line: {err.getvalue()[:300]}')
        if not code:
            path.write_text(out.getvalue())
            if as_yaml(check(read(path)))!=out.getvalue(): raise Wrong('the complete recipe reads as another one')
    return how, size

def small_net():
    torch.manual_seed(0)
    return create('dit_tiny', size=4, ch=1, patch=2, classes=2)

def state_of(net, opt, emas):
    return [net.state_dict(), emas['ema'].avg, {(i, k): v for i,s in enumerate(opt.state.values()) for k,v in s.items()}]

def same(a, b): return all(x.keys()==y.keys() and all(torch.equal(v, y[k]) for k,v in x.items()) for x,y in zip(a, b))

def made(work):
    "A checkpoint of a small network, and what is in it."
    net = small_net()
    opt = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for p in net.parameters(): p.grad = torch.ones_like(p)
    opt.step()
    emas = {'ema': EMA(net, halflife(10))}
    save_checkpoint(work/'good', net, opt, emas, Progress(5, 40), Rng(0), {'train': {'batch': 4}})
    return state_of(net, opt, emas)

def seal(folder, name):
    "Let the manifest agree with a changed file."
    path = folder/'manifest.json'
    m = json.loads(path.read_bytes())
    for f in m['files']:
        if f['name']==name: f.update(bytes=(folder/name).stat().st_size, sha256=digest(folder/name))
    path.write_text(json.dumps(m))

def try_json(rnd, work):
    "A checkpoint's JSON, with a manifest that agrees: the tensors come back as they were, or not at all."
    want = torch.load(work/'want.pt')
    good = next((work/'good').glob('step-*'))
    bad = work/'bad'/good.name
    shutil.rmtree(work/'bad', ignore_errors=True)
    bad.mkdir(parents=True)
    for p in good.iterdir(): os.link(p, bad/p.name)
    name = rnd.choice(['state.json', 'state.json', 'optim.json', 'config.json', 'manifest.json'])
    raw = (bad/name).read_bytes()
    for k in {name, 'manifest.json'}: (bad/k).unlink()
    shutil.copy(good/'manifest.json', bad/'manifest.json')
    (bad/name).write_bytes(mutated(rnd, raw, json.loads, 'json'))
    size = (bad/name).stat().st_size
    if name!='manifest.json': seal(bad, name)
    elif accept(lambda: check_folder(bad))[0]=='refused': return 'refused', size
    def go_on():
        net = small_net()
        opt, emas = torch.optim.AdamW(net.parameters(), lr=1e-3), {'ema': EMA(net, halflife(10))}
        progress = load_checkpoint(bad, net, opt, emas)
        if not all(isinstance(v, int) and not isinstance(v, bool) and v>=0 for v in (progress.step, progress.images, progress.skipped, progress.in_a_row)):
            raise Wrong(f'progress {progress}')
        if not same(state_of(net, opt, emas), want): raise Wrong('other tensors')
    def build():
        if not same([load_denoiser(bad, None).state_dict()], want): raise Wrong('another network')
    return max(accept(go_on)[0], accept(build)[0]), size # 'refused' if one of them is

def try_header(rnd, work):
    "A safetensors file: the tensors are those that the file says, or there is an error."
    raw = (work/'t.safetensors').read_bytes()
    n = int.from_bytes(raw[:8], 'little')
    head, body = raw[8:8+n], raw[8+n:]
    what = rnd.random()
    if what<.6: head = mutated(rnd, head, json.loads, 'json')
    elif what<.7: raw = torn(rnd, raw)
    elif what<.8: head = rnd.choice(SPECIALS)
    elif what<.85: head = json.dumps({f't{i}': dict(dtype='F32', shape=[0], data_offsets=[0, 0]) for i in range(rnd.choice([10, 3000]))}).encode()
    n = len(head)
    if what>.85: n = rnd.choice([0, 1, max(n-1, 0), n+1, n+8, len(raw), 2**20, 2**31, 2**63, 2**64-1])
    if rnd.random()<.2: body = rnd.choice([body[:-1], body+b'x', b'', body*2])
    path = work/'mutated.safetensors'
    path.write_bytes(raw if .6<=what<.7 else n.to_bytes(8, 'little')+head+body)
    size = path.stat().st_size
    how, got = accept(lambda: load_tensors(path))
    if how=='read':
        tensors, meta = got
        if len({id(t): t for t in tensors.values()}) and sum({id(t): t.nbytes for t in tensors.values()}.values())>size: raise Wrong('more bytes than the file has')
        if not isinstance(meta, dict) or not all(isinstance(k, str) for k in tensors): raise Wrong('no tensors by name')
    return how, size

TRY = dict(recipe=try_recipe, json=try_json, header=try_header)

# --- the loop ---
def prepare(work):
    "Good files, and all that is imported late."
    RECIPES.extend(p.read_text() for p in shipped().values())
    torch.set_num_threads(1)
    presets()
    torch.save(made(work), work/'want.pt')
    save_tensors(work/'t.safetensors', dict(a=torch.arange(6.).reshape(2, 3), b=torch.ones(4).bfloat16(), c=torch.arange(3)), dict(step=3))
    for kind in KINDS:
        for i in range(3): one(kind, i, -1, work)

def alarm(n, frame): raise TimeoutError(f'more than {SECONDS} s' if n==signal.SIGPROF else 'it waits for something')

def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024

def one(kind, i, seed, work):
    "A case: what happened."
    rnd = random.Random(f'{kind} {i} {seed}')
    before = peak()
    for n in (signal.SIGPROF, signal.SIGALRM): signal.signal(n, alarm)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(20*SECONDS)
    try:
        how, size = TRY[kind](rnd, work)
        if (more := peak()-before)>2*size+SLACK[kind]: raise Wrong(f'{more/2**20:.0f} MiB for a file of {size} bytes')
        return how, ''
    except BaseException as e: return 'fault', f'{type(e).__name__}: {str(e)[:300]}\n'+''.join(traceback.format_tb(e.__traceback__)[-3:])
    finally: signal.setitimer(signal.ITIMER_PROF, 0); signal.alarm(0)

def in_forks(kind, n, seed, work, at_once=50):
    "Cases in processes of their own, so that one that dies is a fault and no more."
    counts, faults = Counter(), []
    for s in range(0, n, at_once):
        r, w = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(r)
            try:
                resource.setrlimit(resource.RLIMIT_AS, (32*2**30,)*2)
                with os.fdopen(w, 'w') as f:
                    for i in range(s, min(n, s+at_once)):
                        f.write(json.dumps([i, *one(kind, i, seed, work)])+'\n')
                        f.flush()
            finally: os._exit(0)
        os.close(w)
        with os.fdopen(r) as f: got = [json.loads(o) for o in f]
        status = os.waitpid(pid, 0)[1]
        if len(got)<min(n, s+at_once)-s: got.append([s+len(got), 'fault', f'the process died (status {status})'])
        for i,how,why in got:
            counts[how] += 1
            if how=='fault': faults.append((kind, i, why))
    return counts, faults

def fuzz(n, seed, kinds=KINDS, jobs=1):
    "Counts by kind, and the faults."
    work = Path(tempfile.mkdtemp(dir='/dev/shm' if os.path.isdir('/dev/shm') else None))
    os.chdir(work)
    try:
        prepare(work)
        shares = [n//len(kinds)+(k<n%len(kinds)) for k in range(len(kinds))]
        with ProcessPoolExecutor(jobs, multiprocessing.get_context('fork')) as pool:
            done = list(pool.map(in_forks, kinds, shares, [seed]*len(kinds), [work]*len(kinds)))
        return {k: c for k,(c,_) in zip(kinds, done)}, [o for _,bad in done for o in bad]
    finally: shutil.rmtree(work)

if __name__=='__main__':
    p = argparse.ArgumentParser()
    p.add_argument('--n', type=int, default=300)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--kinds', default=','.join(KINDS))
    p.add_argument('--jobs', type=int, default=1, help='kinds at a time; the cases are the same')
    p.add_argument('--out', help='a JSON file')
    a = p.parse_args()
    counts, faults = fuzz(a.n, a.seed, a.kinds.split(','), a.jobs)
    for o in faults: print(*o)
    print(counts)
    if a.out and not faults:
        rows = [dict(what=k, **{o: v[o] for o in ('read', 'refused', 'fault')}) for k,v in counts.items()]
        keep(Path(a.out).stem, rows, f'python tests/fuzz.py --n {a.n} --seed {a.seed}', ('safetensors', 'pyyaml', 'diffnb'), ROOT/Path(a.out).parent)
    sys.exit(bool(faults))
