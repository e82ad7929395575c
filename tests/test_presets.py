"Every preset keeps its kind's promise. A new one is found by its kind and needs no line here."
import atexit, functools, inspect, math, shutil, tempfile
from pathlib import Path
import pytest, torch
from torch import nn
from diffnb import core
from diffnb.core import Denoiser, Feats, create, preset, presets
from diffnb.grids import Grid, uniform
from diffnb.process.gaussian import Gaussian, predictions
from diffnb.rng import Rng
from diffnb.saving import save
from diffnb.schedules import Schedule

F64 = torch.float64
KINDS = 'schedule grid guide sampler masked_sampler weight times denoiser codec dataset'.split()

def named(kind):
    "The names of a kind in the package; none where there is none yet, which `test_kinds` reports."
    try: return [n for n,f in presets(kind).items() if module(f).startswith('diffnb.')]
    except ValueError: return []
def module(f): return inspect.unwrap(f).__module__
def each(kind): return pytest.mark.parametrize('name', named(kind))

@pytest.mark.parametrize('kind', KINDS)
def test_kinds(kind): assert named(kind), f'no preset of the kind {kind}'

def processes():
    "One process of each sort, by name: continuous, tables, rectified flow, EDM."
    return {'cosine': Gaussian('cosine', 'v'), 'table': Gaussian('scaled_linear', 'eps'), 'zero_snr': Gaussian('zero_snr', 'v'),
            'flow': Gaussian('straight', 'flow'), 'edm': Gaussian('edm', 'edm')}

# --- schedules ---
@each('schedule')
def test_schedule(name):
    "All signal and no noise at 0; from there less signal for the noise at each step; `t_of` goes back; finite throughout."
    s = create(name, kind='schedule')
    t = torch.arange(s.T+1, dtype=F64)/s.T if s.T else torch.linspace(0, 1, 1001, dtype=F64)
    alpha, sigma = s(t)
    assert alpha.dtype==sigma.dtype==F64 and alpha.shape==sigma.shape==t.shape
    assert alpha[0]==1 and sigma[0]==0
    assert alpha.isfinite().all() and sigma.isfinite().all() and (alpha>=0).all() and (sigma>=0).all()
    assert (alpha[1:]<=alpha[:-1]).all() and (sigma[1:]>sigma[:-1]).all()
    assert (s.snr(t)[1:]<s.snr(t)[:-1]).all()
    inner = t[1:-1]
    assert (s.t_of(s.ksigma(inner))-inner).abs().max()<1e-7
    for o in (-1e-3, 1.001):
        with pytest.raises(ValueError): s(o)

# --- grids ---
@each('grid')
@pytest.mark.parametrize('n', [1, 2, 3, 10])
def test_grid(name, n):
    "n+1 times that fall strictly from at most 1 to 0; what the network is told is finite. Some process must suit a grid."
    suits = 0
    for p in processes().values():
        try: g = create(name, kind='grid')(p, n, tokens=1024)
        except ValueError: continue
        suits += 1
        assert g.t.dtype==g.net_t.dtype==F64 and g.t.shape==g.net_t.shape==(n+1,)
        assert g.t[0]<=1 and g.t[-1]==0 and (g.t[1:]<g.t[:-1]).all()
        assert g.net_t[:-1].isfinite().all()
    assert suits

@each('grid')
def test_grid_refuses(name):
    "No step at all, and more steps than a table has entries."
    for n in (0, -1, 1001):
        with pytest.raises(ValueError): create(name, kind='grid')(processes()['table'], n)

# --- samplers ---
class Shrink(nn.Module):
    "A network that knows nothing: it gives half of what it sees."
    def forward(self, x, net_t, **cond): return x/2

def run(process, step, n, shape=(4, 3), rng=Rng(0), denoiser=None, **kw):
    from diffnb.samplers import sample
    return list(sample(denoiser or Shrink(), process, shape, steps=n, step=step, rng=rng, **kw))

@each('sampler')
@pytest.mark.parametrize('n', [1, 2, 3])
def test_sampler(name, n):
    "n states of the right shape, finite at both ends of every schedule; the same again; a sample is the same in any batch."
    p = Gaussian('straight', 'flow')
    for o in ('cosine', 'zero_snr', 'flow', 'table'):
        q = processes()[o]
        xs = run(q, create(name, kind='sampler'), n)
        assert len(xs)==n and all(x.shape==(4, 3) and x.isfinite().all() for x in xs), o
    a, b = (run(p, create(name, kind='sampler'), n)[-1] for _ in range(2))
    assert torch.equal(a, b)
    assert torch.equal(run(p, create(name, kind='sampler'), n, (2, 3), Rng(0).of([1, 3]))[-1], a[[1, 3]])
    assert not torch.equal(run(p, create(name, kind='sampler'), n, rng=Rng(1))[-1], a)

@each('sampler')
def test_sampler_at_home(name):
    "Data at a single point: its perfect network leads every sampler to that point."
    mean = lambda x, alpha, sigma: torch.full_like(x, .7)
    for o in ('cosine', 'flow', 'zero_snr'):
        p = processes()[o]
        x = run(p, create(name, kind='sampler'), 20, denoiser=p.oracle(mean), dtype=F64)[-1]
        assert (x-.7).abs().max()<1e-6, o

class Uncertain(nn.Module):
    "A language model that finds every token as good as another."
    def __init__(self, vocab):
        super().__init__()
        self.vocab = vocab
    def forward(self, x, net_t, **cond): return torch.zeros(*x.shape, self.vocab)

@each('masked_sampler')
@pytest.mark.parametrize('n', [1, 2, 3, 8])
def test_masked_sampler(name, n):
    "n states of tokens; what is revealed stays; no mask is left; the same again, in any batch."
    from diffnb.process.masked import Masked
    p = Masked('straight', mask_id=5, vocab=6) if 'straight' in named('schedule') else None
    step = create(name, kind='masked_sampler')
    xs = run(p, step, n, (4, 8), denoiser=Uncertain(6))
    assert len(xs)==n and all(x.shape==(4, 8) and x.dtype==torch.long for x in xs)
    assert ((xs[-1]>=0)&(xs[-1]<5)).all()
    for a,b in zip(xs, xs[1:]): assert torch.equal(a[a!=5], b[a!=5])
    again = run(p, create(name, kind='masked_sampler'), n, (2, 8), Rng(0).of([1, 3]), denoiser=Uncertain(6))[-1]
    assert torch.equal(again, xs[-1][[1, 3]])

# --- weights and times ---
@each('weight')
def test_weight(name):
    "Finite and not negative at both ends, for each prediction that the schedule allows; some weight is given."
    for pred in predictions:
        p = Gaussian('edm' if pred=='edm' else 'cosine' if pred!='eps' else 'linear_beta', pred)
        w = create(name, kind='weight')(p, torch.tensor([0., 1e-9, .3, .7, 1-1e-9, 1.], dtype=F64))
        assert w.isfinite().all() and (w>=0).all() and w.max()>0, pred

@each('times')
def test_times(name):
    "float64 times inside (0,1) that depend on the key alone; some are always 1."
    f = create(name, kind='times')
    t = f(Rng(0), 256)
    if presets('times')[name].facts.get('fixed'): assert t.dtype==F64 and (t==torch.ones(256)).all(); return
    assert t.dtype==F64 and t.shape==(256,) and (t>0).all() and (t<1).all()
    assert torch.equal(t, f(Rng(0), 256)) and not torch.equal(t, f(Rng(1), 256))

# --- denoisers ---
def randomised(m, seed=0):
    "The network with every parameter drawn afresh: zero initialisation would hide faults."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in m.parameters():
            std = 1/math.sqrt(p[0].numel()) if p.ndim>1 else .1
            p.copy_(torch.randn(p.shape, generator=g)*std+(p.ndim==1))
    return m.eval()

def tensors(o):
    "All tensors in nested dicts and sequences."
    if isinstance(o, torch.Tensor): return [o]
    if isinstance(o, dict): o = list(o.values())
    return [t for v in o for t in tensors(v)] if isinstance(o, (list, tuple)) else []

def rows(o, i):
    "Row i of everything that has a batch of 3 in front."
    if isinstance(o, torch.Tensor): return o[i:i+1] if o.ndim and len(o)==3 else o
    if isinstance(o, dict): return {k: rows(v, i) for k,v in o.items()}
    return o

TINY = [n for n in named('denoiser') if n.endswith('_tiny')]
each_tiny = pytest.mark.parametrize('name', TINY)

def test_every_family_has_a_tiny():
    families = {n: module(presets('denoiser')[n]) for n in named('denoiser')}
    assert {families[n] for n in TINY}==set(families.values())

@each('denoiser')
def test_meta(name):
    "A network can be made without memory, to count it or to load it; it remembers how it was made."
    with torch.device('meta'): m = create(name)
    assert all(o.is_meta for o in m.parameters())
    assert m.preset['name']==name
    n = sum(o.numel() for o in m.parameters())
    assert n<200_000 if name in TINY else n>0

@each_tiny
def test_forward(name):
    "Finite output, the same again and in any batch; features, then head, is forward."
    m = randomised(create(name))
    x, net_t, cond = m.demo(3)
    with torch.no_grad():
        y = m(x, net_t, **cond)
        assert y.isfinite().all() and y.shape[0]==3 and y.is_floating_point()
        assert torch.equal(y, m(x, net_t, **cond))
        assert torch.equal(y, m.head(m.features(x, net_t, **cond)))
        for i in range(3):
            one = m(rows(x, i), rows(net_t, i), **rows(cond, i))
            assert torch.allclose(one, y[i:i+1], atol=1e-4, rtol=1e-3), 'a sample depends on its batch'

@each_tiny
def test_inputs_matter(name):
    "The output depends on x and, unless the network ignores it, on time."
    m = randomised(create(name))
    x, net_t, cond = m.demo(3)
    with torch.no_grad():
        y = m(x, net_t, **cond)
        assert not torch.allclose(m(x.flip(0), net_t, **cond), y)
        late = m(x, net_t+.37, **cond)
    assert torch.equal(late, y) if m.time_free else not torch.allclose(late, y)

@each_tiny
def test_gradient(name):
    "The gradient reaches every parameter, and is finite."
    m = randomised(create(name))
    x, net_t, cond = m.demo(3)
    y = m(x, net_t, **cond)
    (y.float()*torch.randn(y.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    assert [k for k,p in m.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]==[]

@each_tiny
def test_null_and_prepare(name):
    "The unconditional branch runs; preparing changes no result, and doing it twice changes nothing."
    m = randomised(create(name))
    x, net_t, cond = m.demo(3)
    with torch.no_grad():
        y = m(x, net_t, **cond)
        ready = m.prepare(**cond)
        twice = m.prepare(**ready)
        assert all(torch.equal(a, b) for a,b in zip(tensors(ready), tensors(twice), strict=True))
        assert torch.allclose(m(x, net_t, **ready), y, atol=1e-5)
        nx, ncond = m.null(x, **cond)
        none = m(nx, net_t, **m.prepare(**ncond))
        assert none.shape==y.shape and none.isfinite().all()
        if [k for k in cond if k not in ('keep', 'mask', 'vec')]: assert not torch.allclose(none, y), 'the condition changes nothing'

@each_tiny
def test_float64(name):
    "Nothing inside is tied to float32."
    m = randomised(create(name)).double()
    x, net_t, cond = m.demo(3)
    def wide(o): return o.double() if isinstance(o, torch.Tensor) and o.is_floating_point() else o
    with torch.no_grad(): y = m(wide(x), net_t, **{k: wide(v) for k,v in cond.items()})
    assert y.dtype==F64 and y.isfinite().all()

# --- guides ---
class Toy(nn.Module):
    "A network with a label, linear in it."
    time_free = False
    def prepare(self, **cond): return cond
    def null(self, x, keep=None, **cond): return x, dict(y=None)
    def forward(self, x, net_t, y=None, **cond): return x*.5+(0 if y is None else y[:,None])

@each('guide')
def test_guide(name):
    "A guide's call gives the network's shape; with w = 1 it is the conditional network, bit for bit."
    x, t, cond = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.rand(3, dtype=F64), dict(y=torch.ones(3))
    want = Toy()(x, t, **cond)
    f = presets('guide')[name]
    assert f()(Toy(), cond)(x, t).shape==x.shape
    if 'w' in inspect.signature(f).parameters:
        assert torch.equal(f(w=1.)(Toy(), cond)(x, t), want)
        assert not torch.equal(f(w=3.)(Toy(), cond)(x, t), want)

# --- codecs ---
@functools.cache
def folder():
    "A codec in a folder, for presets that open one."
    path = Path(tempfile.mkdtemp())/'codec'
    atexit.register(shutil.rmtree, path.parent)
    save(create('vae_tiny', 'codec'), path)
    return str(path)

@each('codec')
def test_codec(name):
    "Images or tokens that are encoded and decoded come back, as exactly as the preset claims (`lossy`: the largest error)."
    f = presets('codec')[name]
    kw = {k: v() for k,v in dict(vocab=lambda: 8, dim=lambda: 16, path=folder).items() if k in inspect.signature(f).parameters}
    g, suits = torch.Generator().manual_seed(0), 0
    with torch.no_grad():
        for x in (torch.randint(256, (3, 3, 16, 16), generator=g, dtype=torch.uint8), torch.randint(8, (3, 16), generator=g)):
            try: z = f(**kw).encode(x)
            except Exception: continue # not data of its sort: refused, or its annotation is
            suits += 1
            back = f(**kw).decode(z)
            assert z.is_floating_point() and z.isfinite().all() and len(z)==3
            assert back.shape==x.shape and back.dtype==x.dtype
            assert (back.double()-x.double()).abs().max()<=f.facts.get('lossy', 0)
    assert suits

# --- data ---
def needs(name): return {p.name for p in inspect.signature(presets('dataset')[name]).parameters.values() if p.default is p.empty}

@pytest.mark.parametrize('name', [o for o in named('dataset') if needs(o) <= {'n'}]) # others read files that do not ship
def test_dataset(name):
    "The same data every time it is asked for."
    f = presets('dataset')[name]
    try: made = [f(8) if needs(name) else f() for _ in range(2)]
    except FileNotFoundError as e: pytest.skip(str(e)) # all of Fashion-MNIST: a package of its own
    pairs = list(zip(*map(lambda o: tensors(tuple(o) if isinstance(o, tuple) else vars(o)), made), strict=True))
    assert pairs and all(torch.equal(a, b) for a,b in pairs)

# --- each check can fail ---
def late(): return Schedule('late', lambda t: (.9-.5*t, t))       # some signal is missing at 0
def flat(): return Schedule('flat', lambda t: (1-t*0, t*0))       # no noise ever
def nan(): return Schedule('nan', lambda t: (1-t, t/t*t))         # 0/0 at the end
def halting(): return lambda process, n, tokens=None: Grid(torch.tensor([1.]+[0.]*n, dtype=F64), torch.zeros(n+1, dtype=F64))
def short(): return lambda process, n, tokens=None: uniform()(process, max(n-1, 1), tokens)
def ambient():
    def step(process, call, x, grid, i, state, rng): return torch.randn_like(x) # from the global generator
    return step
def nowhere():
    def step(process, call, x, grid, i, state, rng): return x*0
    return step
def nudge():
    def step(process, call, x, grid, i, state, rng): return x
    return step # the masks stay
def loud(w=1.): return lambda denoiser, cond=None, **kw: lambda x, t: 2*denoiser(x, t, **cond)
def infinite(): return lambda process, t: process.schedule.snr(t)
def outside(): return lambda rng, n: rng.uniform(n)*2
class Forgetful:
    def encode(self, x): return x.float()
    def decode(self, z): return (z*0).to(torch.uint8)
class Broken(Denoiser):
    "A network with a parameter that nothing uses, whose samples see each other."
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)
    def features(self, x, net_t, **cond): return Feats(x-x.mean(0))
    def head(self, feats): return self.used(feats.h)
    def prepare(self, y=None): return dict(y=y+1)
    def demo(self, b=2, seed=0): return torch.randn(b, 3, generator=torch.Generator().manual_seed(seed)), torch.zeros(b), dict(y=torch.ones(b))
class Big(Broken):
    def __init__(self):
        super().__init__()
        self.big = nn.Linear(500, 500)
def broken_tiny(): return Broken()
def big_tiny(): return Big()

BAD = [('schedule', late, test_schedule), ('schedule', flat, test_schedule), ('schedule', nan, test_schedule),
       ('grid', halting, test_grid), ('grid', short, test_grid), ('grid', halting, test_grid_refuses),
       ('sampler', ambient, test_sampler), ('sampler', nowhere, test_sampler_at_home), ('masked_sampler', nudge, test_masked_sampler),
       ('guide', loud, test_guide), ('codec', Forgetful, test_codec), ('weight', infinite, test_weight), ('times', outside, test_times),
       *(('denoiser', broken_tiny, o) for o in (test_forward, test_inputs_matter, test_gradient, test_null_and_prepare)),
       ('denoiser', big_tiny, test_meta)]

@pytest.mark.parametrize('i', range(len(BAD)), ids=lambda i: f'{BAD[i][0]}-{BAD[i][2].__name__}-{i}')
def test_checks_can_fail(i, monkeypatch):
    kind, f, check = BAD[i]
    def bad(*args, **kw): return f(*args, **kw)
    bad.__signature__ = inspect.signature(f)
    monkeypatch.setitem(core._presets, (kind, 'bad'), None) # is taken out again
    preset(kind)(bad)
    if check is test_meta: monkeypatch.setattr('test_presets.TINY', [*TINY, 'bad'])
    with pytest.raises((AssertionError, pytest.fail.Exception)): check('bad', **({'n': 3} if 'n' in inspect.signature(check).parameters else {}))
