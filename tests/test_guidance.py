"Guides: published weights, one oracle (diffusers' rescaling), and how often each asks the network."
import math
import pytest, torch
from torch import nn
from diffnb.core import create, presets
from diffnb.guidance import (autoguidance, bind, constant, first_channels, guided, interval, linear, of_edm, of_t, of_table, plain,
                             power_cosine, rescale, without)
from diffnb.process.gaussian import Gaussian
from diffnb.process.masked import Masked
from diffnb.rng import Rng
from diffnb.samplers import ancestral, ddim, sample

F64 = torch.float64
def noise(*shape, seed=0, dtype=F64): return Rng(seed).normal(*shape, dtype=dtype)

class Counting(nn.Module):
    "A network with a class whose answers differ by channel; it counts its calls by class."
    def __init__(self):
        super().__init__()
        self.asked = []
    def null(self, x, keep=None, **cond): return x, {**cond, 'y': None}
    def forward(self, x, net_t, y=None, **cond):
        self.asked.append(None if y is None else float(y))
        return .3*x.sin()+(0 if y is None else y)*(1+torch.arange(x.shape[1], dtype=x.dtype).view(1, -1, *[1]*(x.ndim-2)))

X = noise(3, 5, 4, 4)
T = torch.tensor([.4], dtype=F64)
YES, NO = (Counting()(X, T, y=y) for y in (2., None))

def test_line():
    "u + w (c - u), the network asked once with the condition and once without."
    net = Counting()
    for w in (0., .5, 2., 7.5):
        assert torch.allclose(constant(w)(net, dict(y=2.))(X, T), NO+w*(YES-NO), atol=1e-12)
    assert sorted(map(str, net.asked))==['2.0']*4+['None']*4

def test_exact_ends():
    "w = 0 and w = 1 give one branch bit for bit, also where weights differ within the batch."
    assert torch.equal(linear()(YES, NO, 0.), NO) and torch.equal(linear()(YES, NO, 1.), YES)
    a, b = noise(1000, 1, seed=1), 1e3*noise(1000, 1, seed=2) # here b+1*(a-b) is not a
    assert torch.equal(linear()(a, b, 1.), a)
    w = torch.tensor([1., 0., 1.], dtype=F64).view(3, 1, 1, 1)
    got = linear()(YES, NO, w)
    assert torch.equal(got[[0, 2]], YES[[0, 2]]) and torch.equal(got[1], NO[1])

OFF = {n: f(w=1.) if n!='plain' else f() for n,f in presets('guide').items()}|{'autoguidance': autoguidance(Counting().eval(), 1.)}
@pytest.mark.parametrize('name', OFF)
def test_off_asks_once(name):
    "A guide that is off is the conditional network, asks it once, and needs no `null`."
    net = Counting()
    assert torch.equal(OFF[name](net, dict(y=2.))(X, T), YES) and net.asked==[2.]
    OFF[name](lambda x, t, **cond: x, {})(X, T)
    assert not [g for g in presets('guide') if g not in OFF]

def test_needs_a_branch():
    with pytest.raises(ValueError, match='null'): constant(2.)(lambda x, t, **cond: x, {})

# --- weights over time ---
GOLDEN = {4.4: {0: 4.4, 100: 3.50066785, 250: 1.77294752, 500: 1.03266502, 750: 1.00012801, 999: 1.},
          4.6: {100: 3.64776596, 250: 1.81841502, 500: 1.03458650}}
@pytest.mark.parametrize('w', GOLDEN)
def test_power_cosine(w):
    "DiffiT's weights at T = 1000, m = 4, read off a network that answers 1 and 0."
    call = power_cosine(w, time=of_table(1000))(lambda x, t, y: y+0*x, dict(y=1.), uncond=dict(y=0.))
    for i,want in GOLDEN[w].items(): assert abs(call(torch.zeros(1, dtype=F64), torch.tensor([i], dtype=F64)).item()-want)<1e-7

@pytest.mark.parametrize('time,at', [(of_t, lambda s: s), (of_table(1000), lambda s: 1000*s), (of_edm, lambda s: math.log(s)/4)])
def test_interval(time, at):
    "Guided inside, plain and asked once outside; the upper end belongs to it, the lower does not."
    for s,on in ((.1, 0), (.2, 0), (.3, 1), (.6, 1), (.61, 0)):
        net = Counting()
        t = torch.tensor([at(s)], dtype=F64)
        if time is of_edm and s in (.2, .6): continue # not exactly representable as a logarithm
        got = interval(3., .2, .6, time)(net, dict(y=2.))(X, t)
        assert len(net.asked)==1+on
        assert torch.equal(got, YES) if not on else torch.allclose(got, NO+3*(YES-NO))

def test_times_per_sample():
    "Each sample has the weight of its own time."
    t = torch.tensor([.1, .4, .9], dtype=F64)
    got = interval(3., .2, .6)(Counting(), dict(y=2.))(X, t)
    assert torch.equal(got[[0, 2]], YES[[0, 2]]) and torch.allclose(got[1], (NO+3*(YES-NO))[1])
    for i in range(3): assert torch.equal(interval(3., .2, .6)(Counting(), dict(y=2.))(X[i:i+1], t[i:i+1]), got[i:i+1])

def test_wrong_unit():
    "A table's index is not taken for a time."
    for g in (interval(2.), power_cosine(2.)):
        with pytest.raises(ValueError, match='of_table'): g(Counting(), dict(y=2.))(X, torch.tensor([500.]))

def test_weights_follow_the_process():
    "On a table and on a continuous schedule, half of the way is half of the way."
    seen = {}
    for name,p,time in (('flow', Gaussian('straight', 'flow'), of_t), ('table', Gaussian('scaled_linear', 'v'), of_table(1000))):
        net = Counting()
        list(sample(net, p, (1, 2, 4, 4), steps=10, step=ddim(), cond=dict(y=2.), guide=interval(2., .45, .95, time)))
        seen[name] = len(net.asked)
    assert seen=={'flow': 15, 'table': 15} # 5 of the 10 times lie inside

# --- mixes ---
def test_rescale_oracle():
    "Equal to diffusers' rescale_noise_cfg; both mixed the same way."
    pytest.importorskip('diffusers')
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
    cfg = NO+7.5*(YES-NO)
    for phi in (0., .3, .7, 1.):
        assert torch.allclose(rescale(phi)(YES, NO, 7.5), rescale_noise_cfg(cfg, YES, guidance_rescale=phi), atol=1e-12)

def test_rescale_constant_output():
    "An answer without spread has none to restore: no division by zero."
    flat = torch.ones(2, 1, 1, 1)
    assert torch.equal(rescale(.7)(flat, 0*flat, 3.), 3*flat)

def test_first_channels():
    "DiffiT's rule on an output with variance channels: the others carry the conditional value, whatever w is."
    g = constant(4., first_channels(3))(Counting(), dict(y=2.))(X, T)
    assert torch.equal(g[:,3:], YES[:,3:]) and torch.allclose(g[:,:3], (NO+4*(YES-NO))[:,:3])
    w = power_cosine(4.4, mix='first_channels')(Counting(), dict(y=2.))(X, torch.zeros(1, dtype=F64))
    assert torch.equal(w[:,3:], YES[:,3:]) and torch.allclose(w[:,:3], (NO+4.4*(YES-NO))[:,:3])

def test_mixes_nest():
    "Rescaling what was guided in its first channels only."
    inner = first_channels(3)(YES, NO, 5.)
    want = inner*(YES.flatten(1).std(1)/inner.flatten(1).std(1)).view(3, 1, 1, 1)
    assert torch.allclose(rescale(1., 'first_channels')(YES, NO, 5.), want, atol=1e-12)

# --- branches ---
def test_negative_condition():
    "`uncond` takes the place of the null branch."
    net = Counting()
    got = constant(3.)(net, dict(y=2.), uncond=dict(y=-1.))(X, T)
    assert sorted(net.asked)==[-1., 2.]
    against = Counting()(X, T, y=-1.)
    assert torch.allclose(got, against+3*(YES-against))
    assert not torch.allclose(got, constant(3.)(net, dict(y=2.))(X, T))

def test_autoguidance():
    "Away from the weak network, which sees the same condition."
    weak, net = Counting().eval(), Counting()
    weak.forward = lambda x, t, y=None, **cond: weak.asked.append(y) or .1*x*y
    got = autoguidance(weak, 2.)(net, dict(y=2.))(X, T)
    assert weak.asked==[2.] and net.asked==[2.]
    assert torch.allclose(got, 2*YES-.2*X)
    with pytest.raises(ValueError, match='eval'): autoguidance(Counting().train(), 2.)

def test_guides_and_text():
    "On logits `(b,n,v)` with times per sample, a guide broadcasts its weight; guided text has no mask left."
    class LM(Counting):
        def forward(self, x, net_t, y=None, **cond): return (0. if y is None else 1.)*torch.arange(6.)+torch.zeros(*x.shape, 6)
    g = guided(lambda t: 1+t)(LM(), dict(y=1.))(torch.zeros(2, 3, dtype=torch.long), torch.tensor([0., 1.]))
    assert torch.allclose(g[0], torch.arange(6.).expand(3, 6)) and torch.allclose(g[1], 2*torch.arange(6.).expand(3, 6))
    *_, x = sample(LM(), Masked('straight', mask_id=5, vocab=6), (2, 8), steps=4, cond=dict(y=1.), guide=constant(2.))
    assert (x<5).all()

def test_prepared_once():
    "Each branch is prepared once for a trajectory, not at each step."
    class Preparing(Counting):
        ready = 0
        def prepare(self, **cond): self.ready += 1; return cond
    net = Preparing()
    list(sample(net, Gaussian('straight', 'flow'), (1, 2, 4, 4), steps=6, cond=dict(y=2.), w=2.))
    assert net.ready==2 and len(net.asked)==12

def test_reuse_of_estimates():
    "Only a guide whose weight is fixed may reuse the estimate of a network that ignores time."
    class Free(Counting): time_free = True
    for g,free in ((constant(2.), True), (plain(), True), (interval(2., .2, .6), False), (power_cosine(2.), False)):
        assert g(Free(), dict(y=2.)).time_free is free and not g(Counting(), dict(y=2.)).time_free

@pytest.mark.parametrize('name', presets('mix'))
def test_every_mix(name):
    "Off is off, shapes stay, and the preset's name does in place of the function."
    f = create(name, kind='mix')
    assert torch.equal(f(YES, NO, 1.), YES) if name!='rescale' else torch.allclose(f(YES, NO, 1.), YES, atol=1e-12)
    assert torch.equal(constant(3., name)(Counting(), dict(y=2.))(X, T), constant(3., f)(Counting(), dict(y=2.))(X, T))
