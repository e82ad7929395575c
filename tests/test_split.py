"Layers, tokens and experts shared by two processes: outputs, gradients, runs and checkpoints are those of one."
import itertools
from functools import partial
import pytest, torch
import torch.distributed as dist
from diffnb.core import create, presets
from diffnb.process.gaussian import Gaussian
from diffnb.process.masked import Masked
from diffnb.saving import save
from diffnb.train.checkpoint import load_weights
from diffnb.train.cuts import cut_of, mine, sections, whole
from diffnb.train.ema import halflife
from diffnb.train.loop import fit
from diffnb.models.layers import frugal
from diffnb.train.parallel import forked, joined
from diffnb.train.split import split
from diffnb.train.spread import route, spread
from diffnb.train.task import DiffusionTask, adamw, constant

TINY = [n for n in presets('denoiser') if n.endswith('_tiny')]
UNETS = ['controlnet_tiny', 'sd_unet_tiny', 'sdxl_unet_tiny'] # convolutions with attention between them: no plan
TENSOR = {n: (n, {}) for n in TINY if n not in UNETS} | {
    'sit': ('dit_tiny', dict(sit=True)), 'bert_tiny': ('bert_tiny', dict(dropout=0.)), 'blocks of text': ('mlm_tiny', dict(block=4)),
    'plain mlm': ('mlm_tiny', dict(time=0, tied=False)), 'left to right': ('mamba2_tiny', dict(mixer='causal')),
    'hydra': ('mamba2_tiny', dict(mixer='quasi')), 'dimba, hydra': ('dimba_tiny', dict(mixer='quasi', norm='additive')), 'fill': ('flux_tiny', dict(extra=3, guidance=False))}
TOKENS = {'dit': ('dit_tiny', {}), 'sit': ('dit_tiny', dict(sit=True)), 'moe': ('dit_moe_tiny', {}), 'flux': ('flux_tiny', {}), 'fill': ('flux_tiny', dict(extra=3)),
    'second frame': ('flux_tiny', dict(frame=8)), 'a small one': ('flux_tiny', dict(frame=2))}
EXPERTS = {'four': ('dit_moe_tiny', {}), 'six': ('dit_moe_tiny', dict(experts=6, k=3))}

def wide(o): return {k: wide(v) for k,v in o.items()} if isinstance(o, dict) else o.double() if o.is_floating_point() else o

def made(name, **kw):
    "In float64, nowhere zero."
    torch.manual_seed(0)
    frame = kw.pop('frame', None)
    net = create(name, **kw).double()
    if frame: net.frame = frame
    with torch.no_grad():
        for p in net.parameters(): p.add_(torch.randn_like(p), alpha=.1)
    return net

def asked(net, words=6):
    "Four samples; Flux gets an even number of words."
    x, t, cond = net.demo(4)
    if hasattr(net, 'frame'): cond['ref'] = x[:,:,:,:net.frame].flip(0)
    if 'ctx' in cond: cond['ctx'] = torch.cat([cond['ctx'], cond['ctx']], 1)[:,:words]
    return wide(x), t, wide(cond)

def outcome(net, rows=slice(None), **kw):
    "What a network says, and the gradient by all its weights and by x; unevenness of experts weighs as much as the rest."
    x, t, cond = asked(net, **kw)
    x, t, cond = x[rows], t[rows], {k: v[rows] for k,v in cond.items()}
    if x.is_floating_point(): x.requires_grad_()
    y, own = net(x, t, **cond), getattr(net, 'own_loss', lambda: None)()
    (y.square().sum()+(0. if own is None else 1e3*own.sum())).backward()
    return {'out': y.detach(), 'x': x.grad} | {k: p.grad for k,p in net.named_parameters()}

def apart(a, b):
    "The greatest distance, relative to the greatest number of its tensor where that is above 1."
    assert a.keys()==b.keys() and all((a[k] is None)==(v is None) for k,v in b.items())
    return max(float((a[k]-v).abs().max())/max(1., float(v.abs().max())) for k,v in b.items() if v is not None and v.numel())

def each(share, cases, rows=None):
    "What each of two processes gets from every case, and how many numbers it holds."
    out = {}
    with joined('ddp') as ranks:
        for k,(name,kw) in cases.items():
            net = share(made(name, **kw))
            got = outcome(net, rows[ranks.rank] if rows else slice(None))
            x = got.pop('x')
            if share is spread: dist.all_reduce(x) # each has what its tokens say about it
            out[k] = whole(got, net.cuts) | {'x': x}, sum(p.numel() for p in net.parameters())
    return out

def test_all_are_here(): assert {n for n,_ in TENSOR.values()} | set(UNETS)==set(TINY)

@pytest.fixture(scope='module')
def layers(): return forked(2, partial(each, split, TENSOR))
@pytest.mark.parametrize('case', TENSOR)
def test_layers(layers, case):
    name, kw = TENSOR[case]
    net = made(name, **kw)
    want = outcome(net)
    for o in layers:
        got, n = o[case]
        assert apart(got, want)<1e-10 and n<.95*sum(p.numel() for p in net.parameters())

@pytest.fixture(scope='module')
def tokens(): return forked(2, partial(each, spread, TOKENS))
@pytest.mark.parametrize('case', TOKENS)
def test_tokens(tokens, case):
    name, kw = TOKENS[case]
    want = outcome(made(name, **kw))
    for o in tokens: assert apart(o[case][0], want)<1e-10

ROWS = slice(0, 1), slice(1, 4)
@pytest.fixture(scope='module')
def experts(): return forked(2, partial(each, route, EXPERTS, ROWS))
@pytest.mark.parametrize('case', EXPERTS)
def test_experts(experts, case):
    "One sample here, three there."
    name, kw = EXPERTS[case]
    net = made(name, **kw)
    want, held = outcome(net), [o[case][1] for o in experts]
    assert held[0]==held[1]<.9*sum(p.numel() for p in net.parameters())
    for o,rows in zip(experts, ROWS):
        got = dict(o[case][0])
        assert apart(got, want | {k: want[k][rows] for k in ('out', 'x')})<1e-10

def all_to_one():
    with joined('ddp') as ranks:
        net = made('dit_moe_tiny')
        for b in net.blocks: b.mlp.router.gate.weight.data.zero_() # ties: all choose the same two
        want = outcome(net)
        for p in net.parameters(): p.grad = None
        asked = []
        for e in route(net).blocks[0].mlp.experts: e.register_forward_pre_hook(lambda m, args: asked.append(len(args[0])))
        got = outcome(net, ROWS[ranks.rank])
        return apart(whole(got, net.cuts), want | {k: want[k][ROWS[ranks.rank]] for k in ('out', 'x')}), asked

def test_all_choose_one_process():
    "The other is asked nothing, sends all, and still takes part."
    got = forked(2, all_to_one)
    assert all(o[0]<1e-10 for o in got) and sorted(sum(o[1]) for o in got)==[0, 2*4*64]

# --- what cannot be ---
def refused(share, name, kw):
    with joined('ddp'):
        net = made(name, **kw)
        before = {k: v.shape for k,v in net.state_dict().items()}
        try: outcome(share(net), words=5)
        except ValueError as e: return str(e), before=={k: v.shape for k,v in net.state_dict().items()}

@pytest.mark.parametrize('n, share, name, kw, says', [
    (3, split, 'dit_tiny', {}, '4 heads'), (3, split, 'flux_tiny', {}, '2 heads'), (3, split, 'bert_tiny', {}, '4 heads'), (3, split, 'mamba2_tiny', {}, 'cannot be shared'),
    (3, split, 'dit_moe_tiny', {}, 'cannot be shared'), (2, split, 'mamba2_tiny', dict(groups=2), 'those of one group'), *((2, split, k, {}, 'no plan shares a layer') for k in UNETS),
    (3, spread, 'dit_tiny', {}, '4 heads'), (2, spread, 'dit_tiny', dict(size=6), '9 tokens of the image'), (2, spread, 'flux_tiny', {}, '5 tokens of the text'),
    (2, spread, 'diffit_latent_tiny', {}, 'see a map'), (2, spread, 'mlm_tiny', {}, 'no plan for sharing the tokens of MLM'),
    (3, route, 'dit_moe_tiny', {}, '4 experts'), (2, route, 'dit_tiny', {}, 'DiT has no experts')])
def test_refused(n, share, name, kw, says):
    "All processes say the same, and nothing has been cut."
    for error, whole in forked(n, partial(refused, share, name, kw)): assert says in error and whole

def other_faults(tmp):
    said = []
    def note(f):
        try: f()
        except ValueError as e: said.append(str(e))
    with joined('ddp'):
        for share in (split, spread, route): note(lambda: share(create('lora', 'adapter')(made('dit_moe_tiny'))))
        note(lambda: save(split(made('dit_tiny')), tmp))
    return said

def test_other_faults(tmp_path):
    for said in forked(2, partial(other_faults, tmp_path/'net')):
        assert [o.split(':')[0] for o in said]==['this network has adapters']*3+['several processes share this network']
    assert not (tmp_path/'net').exists()

# --- cuts ---
@pytest.mark.parametrize('world', [1, 2, 3])
def test_sections(world):
    "Every row is somebody's to answer for, once; moments are cut likewise, counters not."
    c = sections(1, world, 6, 5, 12, shared=(1,))
    assert sorted(torch.cat([c.rows[r][c.answers(r)] for r in range(world)]).tolist())==list(range(23))
    assert all(len(o)==5+18//world for o in c.rows)
    t = torch.arange(46.).view(2, 23)
    assert torch.equal(c.mine(t, world-1), t[:,c.rows[-1]])
    cuts = {'a.weight': c}
    assert cut_of(cuts, 'a.weight:m', t, True) is c and cut_of(cuts, 'a.weight:step', torch.tensor(1.), True) is None
    assert cut_of(cuts, 'b.weight', t, True) is None

def bits():
    with joined('ddp'):
        c = {'a': sections(0, 2, 2, 2)}
        t = torch.tensor([-0., float('nan'), float('inf'), 1.])
        return [whole(mine({'a': o}, c), c)['a'].view(torch.uint8) for o in (t, t.bfloat16(), t.double())], t

def test_put_together_bit_by_bit():
    for got,t in forked(2, bits):
        for a,b in zip(got, (t, t.bfloat16(), t.double())): assert torch.equal(a, b.view(torch.uint8))

# --- runs ---
B = 4
def data_of(name, start, **kw):
    net = create(name, **kw)
    for k in itertools.count(start//B):
        x, _, cond = net.demo(B, seed=k)
        if not x.is_floating_point(): x = x.masked_fill(x==net.mask_id, 5)
        own = {o: cond.pop(o) for o in ('keep', 'mask') if o in cond}
        yield dict(x=wide(x), idx=k*B+torch.arange(B), cond=wide(cond), **own)

def train(kind, folder, steps, name='dit_tiny', remat=False, **kw):
    "Losses and norms, what the run has come to, and its weights, averages and moments, put together."
    with joined(kind) as ranks:
        net = made(name)
        process = Masked('poly', net.mask_id, 48) if hasattr(net, 'mask_id') else Gaussian('straight', 'flow')
        task = DiffusionTask(frugal(net, remat=remat) if remat else net, process, optimiser=adamw(eps=1e-2), lr=constant(1e-2))
        run = fit(task, partial(data_of, name), steps, folder, averages=dict(ema=halflife(20, 1.)), bar=False, ranks=ranks, log_every=1, save_every=2, clip=.5, **kw)
        net, cuts = run.task.net, getattr(run.task.net, 'cuts', {})
        names = {id(p): k for k,p in net.named_parameters()}
        state = dict(net.state_dict()) | {f'{names[id(p)]}:{k}': v for p,s in run.opt.state.items() for k,v in s.items()}
        put = (lambda o: whole(o, cuts)) if cuts else dict
        return {k: v.clone() for k,v in (put(state) | {f'ema {k}': v for k,v in put(run.emas['ema'].avg).items()}).items()}, [(r['loss'], r['norm']) for r in run.rows]

RUNS = [('tensor', 'dit_tiny'), ('tensor', 'flux_tiny'), ('tensor', 'mlm_tiny'), ('tensor', 'mamba2_tiny'), ('tensor', 'dit_moe_tiny'), ('tokens', 'dit_tiny'), ('tokens', 'dit_moe_tiny'), ('experts', 'dit_moe_tiny')]

@pytest.mark.parametrize('kind, name', RUNS)
def test_a_run_is_that_of_one(tmp_path, kind, name):
    "Two, then one, then two processes: losses, norms, weights, averages and moments; the folder is that of one."
    a, b = tmp_path/'a', tmp_path/'b'
    forked(2, partial(train, kind, a, 2, name))
    train(None, a, 3, name)
    got, (want, rows) = forked(2, partial(train, kind, a, 5, name)), train(None, b, 5, name)
    for state,log in got: assert apart(state, want)<1e-10
    assert torch.tensor(got[0][1]).sub(torch.tensor(rows)).abs().max()<1e-10
    files = [sorted(p.name for p in (o/'step-00000005').iterdir()) for o in (a, b)]
    assert files[0]==files[1]
    for average in ('ema', None):
        nets = [create(name).double() for _ in 'ab']
        for o,net in zip((a, b), nets): load_weights(o, net, average)
        assert apart(nets[0].state_dict(), nets[1].state_dict())<1e-10

@pytest.mark.parametrize('kind, name', [RUNS[0], *RUNS[-3::2]])
def test_parts_and_forgetting(kind, name):
    "Two parts of a batch, and blocks that are computed again."
    parts = 1 if kind=='experts' else 2
    want = train(None, None, 2, name, accumulate=2)[0]
    for state,_ in forked(2, partial(train, kind, None, 2, name, remat=True, accumulate=parts)): assert apart(state, want)<1e-10

def seen(kind, name):
    out = []
    def look(run): out.append({k: v.clone() for k,v in run.task.net.state_dict().items()})
    state = train(kind, None, 2, name, hooks=dict(end=look))[0]
    return {k: state[k] for k in out[0]} if out else None, out

@pytest.mark.parametrize('kind, name', RUNS[-3::2])
def test_hooks_see_whole_networks(kind, name):
    (want, (got,)), (none, nothing) = forked(2, partial(seen, kind, name))
    assert none is None and nothing==[] and apart(got, want)==0
