"Training by two processes: the same run as by one, whole or cut, stopped, resumed by another number, and killed."
import itertools, math, os, signal
from functools import partial
from pathlib import Path
import pytest, torch
from diffnb.core import create, presets
from diffnb.process.gaussian import Gaussian, SelfCond
from diffnb.process.masked import Masked
from diffnb.store import check_folder
from diffnb.train.checkpoint import load_weights
from diffnb.train.ema import averaged, halflife
from diffnb.train.loop import fit, rows
from diffnb.models.layers import frugal
from diffnb.train.parallel import KINDS, Group, forked, joined
from diffnb.train.task import DiffusionTask, adamw, constant

ROOT = Path(__file__).resolve().parents[1]
TINY = [n for n in presets('denoiser') if n.endswith('_tiny')]
WAYS = 'ddp', 'fsdp2' # those that share a network: test_split
B = 5 # parts of two and of three

def wide(o): return {k: wide(v) for k,v in o.items()} if isinstance(o, dict) else o.double() if o.is_floating_point() else o

def task_of(name, **kw):
    "A task in float64 whose weights are nowhere zero."
    torch.manual_seed(0)
    net = create(name).double()
    with torch.no_grad():
        for p in net.parameters(): p.add_(torch.randn_like(p), alpha=.05)
    x = net.demo(1)[0]
    if x.is_floating_point(): process = Gaussian('straight', 'flow', self_cond=SelfCond(.5, -1) if 'dimba' in name else None)
    else: process = Masked('poly', net.mask_id, 48)
    return DiffusionTask(net, process, optimiser=adamw(eps=1e-2), lr=constant(1e-2), **kw) # a small eps would enlarge rounding

def data_of(net, start, b=B):
    "A batch a step, for ever."
    for k in itertools.count(start//b):
        x, _, cond = wide(dict(zip('xtc', net.demo(b, seed=k)))).values()
        if x.ndim==3: x = x.chunk(2, -1)[0] # dimba also sees its last estimate
        if not x.is_floating_point(): x = x.masked_fill(x==net.mask_id, 5)
        own = {o: cond.pop(o) for o in ('keep', 'mask') if o in cond}
        yield dict(x=x, idx=k*b+torch.arange(b), cond=cond, **own)

def go(name, ranks=None, steps=3, folder=None, task=None, **kw):
    task = task or task_of(name)
    demo = create(name)
    return fit(task, partial(data_of, demo), steps, folder, averages=dict(ema=halflife(20, 1.)), bar=False, ranks=ranks,
               **{**dict(clip=.5), **kw})

def numbers(run):
    "All that a run is, put together."
    def whole(t): return (t.full_tensor() if hasattr(t, 'full_tensor') else t).detach().clone()
    out = {k: whole(v) for k,v in run.task.net.state_dict().items()}
    out |= {f'ema/{k}': whole(v) for k,v in run.emas['ema'].avg.items()}
    names = {id(p): k for k,p in run.task.net.named_parameters()}
    out |= {f'{names[id(p)]}:{k}': whole(v) for p,s in run.opt.state.items() for k,v in s.items() if torch.is_tensor(v)}
    return out | {'loss': torch.tensor([run.last.loss, run.last.norm]), 'each': run.last.each, 't': run.last.t}

def far(a, b):
    "The greatest distance, relative to the greatest number of its tensor where that is above 1."
    assert a.keys()==b.keys()
    return max((float((v.double()-b[k].double()).abs().max())/max(1., float(b[k].double().abs().max())) for k,v in a.items() if v.numel()))

def everywhere():
    "What each of two processes gets, by kind and preset."
    out = {}
    with joined('ddp'):
        for kind in WAYS:
            for name in TINY:
                try: out[kind, name] = numbers(go(name, KINDS[kind](Group())))
                except Exception as e: out[kind, name] = repr(e)
    return out

@pytest.fixture(scope='module')
def both(): return forked(2, everywhere)

@pytest.mark.parametrize('kind', WAYS)
@pytest.mark.parametrize('name', TINY)
def test_two_are_one(both, kind, name):
    want = numbers(go(name, accumulate=2 if 'bert' in name else 1)) # dropout is seeded for each part
    for got in both: assert far(got[kind, name], want)<1e-10

# --- runs in folders ---
def train(kind, folder, steps, name='dit_tiny', data=None, **kw):
    "What the same command does each time, with as many processes as there are; rank 0's numbers."
    with joined(kind) as ranks:
        task = task_of(name)
        data = (data or data_of)
        run = fit(task, partial(data, create(name)), steps, folder, averages=dict(ema=halflife(20, 1.)), bar=False, ranks=ranks,
                  **{**dict(save_every=2, log_every=1), **kw})
        return numbers(run), run.progress, run.stopped, ranks.rank

@pytest.mark.parametrize('kind', WAYS)
def test_goes_on_with_another_number(tmp_path, kind):
    "2, 1 and 2 processes on one folder are one run; only rank 0 writes the log; the folder is that of a single process."
    forked(2, partial(train, kind, tmp_path/'a', 2))
    train(None, tmp_path/'a', 4)
    got = forked(2, partial(train, kind, tmp_path/'a', 6))
    want = train(None, tmp_path/'b', 6)
    assert all(far(o[0], want[0])<1e-10 for o in got) and got[0][1]==got[1][1]==want[1]
    assert [r['step'] for r in rows(tmp_path/'a')]==list(range(1, 7))
    assert [(r['loss'], r['loss_by_t']) for r in rows(tmp_path/'a')]==[(pytest.approx(r['loss'], abs=1e-10), r['loss_by_t']) for r in rows(tmp_path/'b')]
    files = [sorted(p.name for p in (tmp_path/o).rglob('*') if p.name!='log.txt') for o in 'ab']
    assert files[0]==files[1] and check_folder(tmp_path/'a'/'step-00000006')
    for average in ('ema', None):
        nets = [create('dit_tiny').double() for _ in 'ab']
        for o,net in zip('ab', nets): load_weights(tmp_path/o, net, average)
        assert far(nets[0].state_dict(), nets[1].state_dict())<1e-10

def write(tensors, path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    with joined('fsdp2') as ranks:
        mesh = init_device_mesh('cpu', (2,))
        mine = {k: distribute_tensor(t, mesh, [Shard(0)]) if t.ndim and t.numel() else t for k,t in tensors.items()}
        with ranks.folder(path) as tmp: ranks.write(tmp/'x.safetensors', mine)
        back = ranks.read(path/'x.safetensors', mine)
        return all(torch.equal(getattr(back[k], 'full_tensor', lambda: back[k])(), t) and type(back[k]) is type(mine[k]) for k,t in tensors.items())

def test_many_writers_one_file(tmp_path):
    "Cut or not, odd or short: the bytes are those that one process writes."
    from diffnb.store import save_tensors
    g = torch.Generator().manual_seed(0)
    tensors = dict(odd=torch.randn(5, 3, generator=g), one=torch.randn(1, 4, generator=g), even=torch.randn(4, generator=g).bfloat16(),
                   scalar=torch.tensor(3.), none=torch.zeros(0, 2), kernel=torch.randn(3, 2, 2, 2, generator=g).double())
    save_tensors(tmp_path/'x.safetensors', tensors)
    assert forked(2, partial(write, tensors, tmp_path/'folder'))==[True, True]
    assert (tmp_path/'folder'/'x.safetensors').read_bytes()==(tmp_path/'x.safetensors').read_bytes()

def looked(folder):
    seen = []
    def look(run):
        net = averaged(run.task.net, run.emas['ema'])
        seen.append((run.progress.step, net.state_dict(), {k: v.clone() for k,v in run.task.net.state_dict().items()}))
    def step(run):
        if run.progress.step==2: look(run)
    out = train('fsdp2', folder, 3, hooks=dict(start=lambda run: seen.append('start'), step=step, end=look))
    return out[0], seen

def test_hooks_see_whole_networks(tmp_path):
    "Rank 0 calls them, and draws and measures what a single process would."
    (got, seen), (_, none) = forked(2, partial(looked, tmp_path/'a'))
    assert none==[] and [o if o=='start' else o[0] for o in seen]==['start', 2, 3]
    for k,v in seen[2][1].items(): assert torch.equal(v, got[f'ema/{k}'])
    for k,v in seen[2][2].items(): assert torch.equal(v, got[k])
    want = train(None, tmp_path/'b', 2)[0]
    assert far(seen[1][2], {k: want[k] for k in seen[1][2]})<1e-10

def interrupted(net, start):
    for b in data_of(net, start):
        if int(b['idx'][0])==2*B and os.environ.get('RANK')=='1': signal.raise_signal(signal.SIGUSR1)
        yield b

@pytest.mark.parametrize('kind', WAYS)
def test_a_signal_to_one_stops_all(tmp_path, kind):
    got = forked(2, partial(train, kind, tmp_path, 9, data=interrupted))
    assert [(o[1].step, o[2]) for o in got]==[(3, 'SIGUSR1')]*2 and (tmp_path/'latest').read_text().strip()=='step-00000003'

def spoilt(net, start):
    "The last sample of the second batch, which rank 1 sees, is not finite."
    for b in data_of(net, start):
        if int(b['idx'][0])==B: b['x'][-1] = math.inf
        yield b

@pytest.mark.parametrize('kind', WAYS)
def test_all_skip_what_one_cannot(tmp_path, kind):
    "With loss scaling in float16, too: all halve the scale."
    got = forked(2, partial(half, kind, spoilt))
    want = half(None, spoilt)
    assert got[0][1]==got[1][1]==want[1] and want[1].skipped==1 and want[1].scaler['scale']==2.**15
    assert all(far(o[0], want[0])<1e-3 for o in got)

def half(kind, data, amp=torch.float16, accumulate=1, **kw):
    "A run in float32 with half precision inside, with the same parts for one process and for two."
    with joined(kind) as ranks:
        task = task_of('dit_tiny')
        frugal(task.denoiser.float(), **kw)
        def single(start): return ({k: v.float() if k=='x' else v for k,v in b.items()} for b in data(create('dit_tiny'), start))
        run = fit(task, single, 4, averages=dict(ema=halflife(20, 1.)), bar=False, ranks=ranks, amp=amp, accumulate=accumulate*2//ranks.world)
        return numbers(run), run.progress

@pytest.mark.parametrize('kind', WAYS)
def test_half_precision_parts_and_forgetting(kind):
    "Two processes with two parts each, and with blocks that are computed again, are one process with four."
    want = half(None, data_of, torch.bfloat16, 2)[0]
    for remat in (False, True):
        for o,_ in forked(2, partial(half, kind, data_of, torch.bfloat16, 2, remat=remat)): assert far(o, want)<(1e-9 if kind=='ddp' else 1e-4)
