"The probability flow to a tolerance against scipy's own driver and closed forms; likelihoods against exact densities."
import math
import numpy as np
import pytest, torch
from scipy.integrate import solve_ivp
from torch import nn
from diffnb.data.toy import GaussianData, Mixture
from diffnb.process.gaussian import Gaussian
from diffnb.rng import Rng
from diffnb.samplers import sample
from diffnb.samplers.likelihood import adaptive, between, bits_per_dim, dormand_prince, field, floor_of, log_likelihood, spread_levels

F64 = torch.float64
DATA = GaussianData(torch.tensor([1.5]), .6)
FULL = GaussianData(torch.tensor([.5, -1., 0.]), cov=torch.tensor([[1., .5, 0.], [.5, .8, -.2], [0., -.2, .3]]))
MIX = Mixture(torch.tensor([[-1.5, 0.], [1.5, .8], [.6, -1.4]], dtype=F64), .3, torch.tensor([.5, .3, .2], dtype=F64))
P = {'flow': Gaussian('straight', 'flow'), 'cosine': Gaussian('cosine', 'v'), 'table': Gaussian('scaled_linear', 'eps'), 'zero_snr': Gaussian('zero_snr', 'v'),
     'edm': Gaussian('edm', 'edm')}

def test_against_solve_ivp():
    "The same equation by scipy's driver, one sample at a time: both within their tolerance of each other, at a like number of calls."
    p = P['flow']
    calls = [0]
    f = field(p, p.oracle(MIX.posterior_mean))
    def counted(y, u): calls[0] += len(y); return f(y, u)
    y = Rng(0).normal(12, 2, dtype=F64)
    got = dormand_prince(counted, y, 1., .01, 1e-6, 1e-6)
    theirs = 0
    for a,b in zip(y, got):
        o = solve_ivp(lambda u, v: f(torch.from_numpy(v)[None], torch.tensor([u], dtype=F64))[0].numpy(), (1., .01), a.numpy(), rtol=1e-6, atol=1e-6)
        theirs += o.nfev
        assert np.abs(o.y[:,-1]-b.numpy()).max()<1e-4
    assert calls[0]<2*theirs, (calls[0], theirs) # the batch waits for its slowest sample

@pytest.mark.parametrize('name', P)
def test_end_point(name):
    "Normal data: m + z sd from a start z deviations off, up to what the last step from the smallest noise level leaves."
    p = P[name]
    alpha, sigma = p.schedule(1.)
    z = torch.tensor([[-1.], [0.], [2.]], dtype=F64)
    x = alpha*1.5+z*(alpha**2*.36+sigma**2).sqrt()
    k = p.schedule.ksigma(floor_of(p)).item()
    for n in (1, 4):
        *_, x0 = sample(p.oracle(DATA.posterior_mean), p, (3, 1), n, adaptive(1e-7, 1e-7), x=x)
        assert (x0-(1.5+.6*z)).abs().max()<2*k**2/.36+1e-5, n # Euler's last step errs by the square of the noise level

def test_tolerance():
    "A hundred times smaller tolerance: an error at least ten times smaller, at more calls."
    p, e, n = P['flow'], [], []
    t, one = floor_of(p, 1e-3), torch.ones(1, dtype=F64)
    z = torch.tensor([[-1.], [2.]], dtype=F64)
    want = (1-t)*1.5+z*((1-t)**2*.36+t**2).sqrt()
    for tol in (1e-3, 1e-5, 1e-7):
        calls = []
        net = p.oracle(DATA.posterior_mean)
        e.append((between(p, lambda x, t: calls.append(0) or net(x, t), z, one, t, tol, tol)-want).abs().max().item())
        n.append(len(calls))
    assert e[1]<e[0]/10 and e[2]<e[1]/10 and n[0]<n[1]<n[2]

def test_there_and_back():
    p, x = P['table'], MIX.sample(50, seed=1)
    call, t, one = p.oracle(MIX.posterior_mean), floor_of(P['table']), torch.ones(1, dtype=F64)
    noise = between(p, call, x, t, one, 1e-8, 1e-8)
    assert torch.allclose(between(p, call, noise, one, t, 1e-8, 1e-8), x, atol=1e-5)

def test_step_sizes_are_each_samples_own():
    "A stiff sample does not make its neighbours' steps shorter: their result is bit for bit that of a batch without it."
    def f(y, u): return torch.where(y>5, -200*(y-6-u[:,None].sin()), -y)
    y = torch.tensor([[1.], [2.], [9.]], dtype=F64)
    assert torch.equal(dormand_prince(f, y, 0., 1.)[:2], dormand_prince(f, y[:2], 0., 1.))

def test_no_solution():
    "An equation that explodes, or answers with NaN, is an error and not an endless loop."
    for f in (lambda y, u: y**2*100, lambda y, u: y*float('nan')):
        with pytest.raises(ValueError, match='cannot be solved'): dormand_prince(f, torch.ones(1, 1, dtype=F64), 0., 1.)
    with pytest.raises(ValueError, match='cannot be solved'): dormand_prince(lambda y, u: (1e4*u[:,None]).sin()*1e3, torch.ones(1, 1, dtype=F64), 0., 1., limit=50)

# --- likelihood ---
@pytest.mark.parametrize('name', ['flow', 'zero_snr'])
def test_normal_data(name):
    "Exact where the noise is exactly the prior. The table ends above zero noise, so the density is that of data with so much noise."
    p, x = P[name], FULL.sample(16, seed=3)
    k = p.schedule.ksigma(floor_of(p)).item()
    noisy = GaussianData(FULL.mean, cov=torch.tensor([[1., .5, 0.], [.5, .8, -.2], [0., -.2, .3]], dtype=F64)+k**2*torch.eye(3, dtype=F64))
    got = log_likelihood(p.oracle(FULL.posterior_mean), p, x, probes=None, rtol=1e-8, atol=1e-8)
    assert torch.allclose(got, noisy.log_prob(x), atol=1e-6)

def test_round_data_need_one_probe():
    "Where the Jacobian is a multiple of the identity, signs give its trace exactly, in any dimension."
    p, d = P['flow'], GaussianData(torch.zeros(48), .5)
    x = d.sample(4, seed=0)
    def net(x, t, **c): return p.oracle(d.posterior_mean)(x.flatten(1), t).view_as(x)
    got = log_likelihood(net, p, x.view(4, 3, 4, 4), rtol=1e-7, atol=1e-7)
    assert torch.allclose(got, d.log_prob(x), atol=2e-3) # the data are taken at noise level 0.002: 48*(.002/.5)^2/2 = 4e-4
    bits = bits_per_dim(got, 48)
    assert torch.allclose(bits, 7-d.log_prob(x)/(48*math.log(2)), atol=1e-4)

def test_hutchinson_is_unbiased():
    p, x = P['flow'], FULL.sample(8, seed=3)
    net = p.oracle(FULL.posterior_mean)
    exact = log_likelihood(net, p, x, probes=None)
    each = torch.stack([log_likelihood(net, p, x, rng=Rng(s)) for s in range(40)])
    assert ((each.mean(0)-exact).abs()<4*each.std(0)/40**.5+1e-4).all()
    assert each.std(0).max()>.1 # there is something to average

def test_a_likelihood_is_its_own():
    "It depends on neither the batch nor its order; the probes belong to the sample."
    p, x = P['flow'], FULL.sample(6, seed=3)
    net = p.oracle(FULL.posterior_mean)
    whole = log_likelihood(net, p, x)
    part = log_likelihood(net, p, x[[4, 1]], rng=Rng(0).of([4, 1]))
    assert torch.allclose(part, whole[[4, 1]], atol=1e-9)

def test_integrates_to_one():
    "Over the line, the density of a network that is no posterior mean at all still integrates to 1: it is the density of the flow that it defines."
    p = P['flow']
    def net(x, t, **c): return x.tanh()*1.5+.5*torch.as_tensor(t).to(x).view(-1, 1)
    x = torch.linspace(-12, 12, 1201, dtype=F64)[:,None]
    got = log_likelihood(net, p, x, probes=None, rtol=1e-6, atol=1e-6).exp()
    assert abs(torch.trapezoid(got, x[:,0]).item()-1)<1e-3

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop, self.w = nn.Dropout(.5), nn.Parameter(torch.ones(()))
    def forward(self, x, t, y=None, **c): return self.drop(x)*self.w+(0 if y is None else y[:,None])

def test_mode_grad_and_condition():
    "In eval mode, with no gradient left on the network, in float32 as well; a condition changes the density."
    net, p, x = Net().train(), P['flow'], torch.ones(3, 2)
    a, b = log_likelihood(net, p, x), log_likelihood(net, p, x)
    assert net.training and net.w.grad is None and not a.requires_grad and torch.equal(a, b) and a.dtype==F64
    with torch.no_grad(): assert torch.equal(log_likelihood(net, p, x), a)
    assert not torch.allclose(log_likelihood(net, p, x, cond=dict(y=torch.ones(3))), a)
    with pytest.raises(ValueError, match='probe'): log_likelihood(net, p, x, probes=0)

def test_levels():
    "Every grey level stays within its bounds, evenly; the bits of the uniform density are 8."
    v = torch.arange(256).repeat(400, 1)
    x = spread_levels(v)
    place = (x.double()+1)*128-v
    assert place.min()>-1e-4 and place.max()<1+1e-4 and x.dtype==torch.float32 # which rounds by a hundred-thousandth of a level
    assert abs(place.mean()-.5)<.01 and abs(place.var()-1/12)<.005
    assert abs(bits_per_dim(torch.tensor([-100*math.log(2)]), 100).item()-8)<1e-5
