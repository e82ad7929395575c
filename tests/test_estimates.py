"""What an estimate computes, and when: nothing that nobody asks for."""
import pytest, torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from diffnb.core import Est, combine, presets
from diffnb.data.toy import GaussianData
from diffnb.process.gaussian import Gaussian, SelfCond
from diffnb.rng import Rng
from diffnb.samplers import ddim, euler, sample
from diffnb.samplers.solvers import clipped

N = 512 # elements of a batch: smaller tensors are coefficients
X, RAW = Rng(0).normal(2, N//2), Rng(1).normal(2, N//2)
ROWS = [Gaussian('straight', 'flow'), Gaussian('scaled_linear', 'eps'), Gaussian('scaled_linear', 'v'), Gaussian('scaled_linear', 'x0'),
        Gaussian('edm', 'edm')]
ids = [p.pred.name for p in ROWS]

class Made(TorchDispatchMode):
    "Operations that give a tensor as large as the batch. Views are none."
    def __init__(self):
        super().__init__()
        self.ops = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view and any(torch.is_tensor(o) and o.numel()>=N for o in tree_leaves(out)): self.ops.append(str(func))
        return out

def made(f):
    with Made() as m: f()
    return m.ops

def walk(p, step, n, x=X):
    return list(sample(lambda x, t: RAW, p, tuple(X.shape), n, step, x=x, rng=Rng(3)))

def time(o): return torch.tensor([o], dtype=torch.float64)

def test_a_flow_step_is_one_operation():
    assert made(lambda: walk(ROWS[0], euler(), 7))==['aten.add.Tensor']*7

@pytest.mark.parametrize('p', ROWS, ids=ids)
def test_a_first_order_step_adds_up_what_there_is(p):
    "x_t and the output: a product and a sum. With noise one more; EDM also scales what the network sees."
    scaled = p.pred.scale is not None
    n = 6
    assert len(made(lambda: walk(p, ddim(), n)))<=(2+scaled)*n
    assert len(made(lambda: walk(p, None, n)))<=(3+scaled)*n

@pytest.mark.parametrize('p', ROWS, ids=ids)
def test_an_estimate_is_made_when_asked_for_and_once(p):
    scaled = p.pred.scale is not None
    t = time(.4)
    assert len(made(lambda: p.estimate(lambda x, t: RAW, X, t)))==scaled
    est = p.estimate(lambda x, t: RAW, X, t)
    assert len(made(lambda: est.x0))<=2 and made(lambda: (est.x0, est.x0.shape))==[]
    assert len(made(lambda: est.eps))<=2 and made(lambda: est.eps)==[]
    assert est.x0 is est.x0

@pytest.mark.parametrize('name', [n for n,f in presets('sampler').items() if n!='adaptive'])
@pytest.mark.parametrize('p', ROWS[:4], ids=ids[:4])
def test_to_look_changes_nothing(p, name):
    "A step whose estimates were looked at gives the same bits."
    class Watched:
        def __getattr__(self, k): return getattr(p, k)
        def estimate(self, *a, **k):
            est = p.estimate(*a, **k)
            assert est.x0.shape==est.eps.shape
            return est
    net = p.oracle(GaussianData(torch.tensor([1.5]), .6).posterior_mean)
    a, b = (list(sample(net, o, (3, 1), 8, presets('sampler')[name](), rng=Rng(3))) for o in (p, Watched()))
    assert all(torch.equal(x, y) for x,y in zip(a, b))

@pytest.mark.parametrize('p', ROWS, ids=ids)
def test_the_mixture_is_the_mixture_of_both(p):
    for t in (time(.4), torch.tensor([.2, .9], dtype=torch.float64)):
        est = p.estimate(lambda x, t: RAW.double(), X.double(), t)
        for a,b in ((.3, -.7), (1., 0.), (0., 2.), (torch.tensor([[.3], [2.]], dtype=torch.float64), 1.)):
            assert torch.allclose(combine(*est.terms(x0=a, eps=b)), a*est.x0+b*est.eps, rtol=0, atol=1e-11*float(est.x0.abs().max()+est.eps.abs().max()))

def test_what_is_replaced_counts():
    p, t, s = ROWS[2], time(.6), time(.3)
    est = p.estimate(lambda x, t: RAW, X, t)
    cut = est._replace(x0=est.x0.clamp(-.5, .5))
    assert cut.x0.abs().max()<=.5 and torch.equal(cut.eps, est.eps) and not torch.equal(cut.x0, est.x0)
    alpha,sigma = p.schedule.wide(s, X)
    assert torch.allclose(combine(*cut.terms(alpha, sigma)), alpha*cut.x0+sigma*est.eps, atol=1e-6)
    assert torch.equal(p.step(X, cut, t, s, Rng(1)), p.step(X, Est(cut.x0), t, s, Rng(1)))
    assert cut._replace(logvar=.5).logvar==.5 and torch.equal(cut._replace(logvar=.5).x0, cut.x0)
    *_, x = walk(p, clipped(ddim(), .5), 5)
    assert x.abs().max()<=.5

def test_a_cleaned_estimate_is_read_as_if_the_network_gave_it():
    p = Gaussian('cosine', 'v', clean=lambda x0: x0.clamp(-.1, .1))
    net = Gaussian('cosine', 'x0')
    t = time(.4)
    est = p.estimate(lambda x, t: RAW, X, t)
    want = net.estimate(lambda x, t: est.x0, X, t)
    assert est.x0.abs().max()<=.1+1e-6 and torch.equal(est.x0, want.x0) and torch.equal(est.eps, want.eps)

def test_the_last_estimate_is_what_the_network_is_shown():
    "Self-conditioning asks for x0, which is then made; the first step shows zeros."
    p, seen = Gaussian('cosine', 'x0', self_cond=SelfCond(axis=1)), []
    def net(x, t):
        seen.append(x[:,N//2:])
        return x[:,:N//2]/2
    xs = list(sample(net, p, tuple(X.shape), 3, ddim(), x=X))
    assert torch.equal(seen[0], torch.zeros_like(X))
    for o,x in zip(seen[1:], [X, *xs]): assert torch.equal(o, x/2)

def test_nothing_that_was_given_is_written_to():
    x, raw = X.clone(), RAW.clone()
    for p in ROWS:
        for f in (euler(), ddim(1.), None): list(sample(lambda x, t: raw, p, tuple(X.shape), 4, f, x=x))
    assert torch.equal(x, X) and torch.equal(raw, RAW)
