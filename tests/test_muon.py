"Muon against torch's own, a singular value decomposition, AdamW, and a run that stops and goes on."
from functools import partial
import pytest, torch
from torch import nn
from diffnb.core import create, presets
from diffnb.data.images import batches, fashion_mnist, floats
from diffnb.process.gaussian import Gaussian
from diffnb.rng import Rng
from diffnb.train.ema import halflife
from diffnb.train.loop import fit
from diffnb.train.muon import Muon, muon, orthogonal
from diffnb.train.task import DiffusionTask, adamw, constant

@pytest.mark.parametrize('shape', [(16, 16), (20, 50), (50, 20), (8, 4, 3, 3), (24, 7, 3)])
@pytest.mark.parametrize('scale', [1e-6, 1., 1e6])
def test_all_directions_alike(shape, scale):
    m = Rng(0).normal(1, *shape, dtype=torch.float64)[0]*scale
    o = orthogonal(m)
    assert o.shape==m.shape
    u,s,vt = torch.linalg.svd(m.flatten(1), full_matrices=False)
    inner = u.T@o.flatten(1)@vt.T
    assert (inner-inner.diagonal().diag()).abs().max()<1e-9 # the directions stay
    big = inner.diagonal()[s>.01*s.norm()]
    assert big.min()>.65 and big.max()<1.25

@pytest.mark.skipif(not hasattr(torch.optim, 'Muon'), reason='torch.optim.Muon came with torch 2.9')
@pytest.mark.parametrize('shape', [(32, 32), (24, 80), (80, 24)])
@pytest.mark.parametrize('decay', [0., .1])
def test_the_same_steps_as_torch(shape, decay):
    ours, theirs = (nn.Linear(shape[1], shape[0], bias=False) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    a, b = muon(decay)(ours), torch.optim.Muon(theirs.parameters(), weight_decay=decay, adjust_lr_fn='match_rms_adamw')
    start = ours.weight.detach().clone()
    for k in range(6):
        for net,opt in ((ours, a), (theirs, b)):
            net.weight.grad = Rng(1).at('gradient', step=k).normal(*shape)
            for g in opt.param_groups: g['lr'] = .02
            opt.step()
    # theirs iterates in bfloat16: two or three digits
    assert (ours.weight-theirs.weight).norm()<.02*(ours.weight-start).norm()

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_the_rest_is_adamw(dtype):
    nets = [nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)).to(dtype) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    opts = [muon(.1, betas=(.8, .97), least=100)(nets[0]), adamw(.1, (.8, .97))(nets[1])]
    for k in range(9):
        for net,opt in zip(nets, opts):
            for g in opt.param_groups: g['lr'] = .01*(k+1)
            opt.zero_grad()
            net(Rng(2).at('x', step=k).normal(6, 5, dtype=dtype)).square().sum().backward()
            opt.step()
    for p,q in zip(*(o.parameters() for o in nets)): torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)

def names(opt, turn): return {k for g in opt.param_groups if g['turn'] is turn for k in g['param_names']}

def test_where_each_parameter_goes():
    net = nn.ModuleDict(dict(table=nn.Embedding(40, 20), free=nn.Embedding(40, 20), conv=nn.Conv2d(4, 16, 3), head=nn.Linear(20, 40),
                             short=nn.Linear(20, 8), norm=nn.LayerNorm(20), up=nn.ConvTranspose2d(16, 3, 3), frozen=nn.Linear(32, 32)))
    net['frozen'].requires_grad_(False)
    net['head'].weight = net['table'].weight # tied: a table
    opt = muon(.3)(net)
    assert names(opt, True)=={'conv.weight', 'up.weight'}
    every = {k for k,p in net.named_parameters() if p.requires_grad}
    assert names(opt, False)==every-names(opt, True)
    decays = {k: g['weight_decay'] for g in opt.param_groups for k in g['param_names']}
    assert {k for k,v in decays.items() if v}=={'conv.weight', 'short.weight', 'up.weight'} and decays['up.weight']==.3

@pytest.mark.parametrize('name', [k for k in presets('denoiser') if k.endswith('_tiny')])
def test_every_small_network_takes_a_step(name):
    net = create(name)
    opt = muon()(net)
    held = [id(p) for g in opt.param_groups for p in g['params']]
    assert sorted(held)==sorted(id(p) for p in net.parameters() if p.requires_grad) and len(set(held))==len(held)
    x,t,cond = net.demo()
    out = net(x, t, **cond)
    (out if torch.is_tensor(out) else out[0]).square().mean().backward()
    for g in opt.param_groups: g['lr'] = 1e-3
    opt.step()
    assert all(p.isfinite().all() for p in net.parameters())

def run(tmp, steps, folder=None, every=None):
    torch.manual_seed(0)
    net = create('diffit_tiny', size=28, ch=1, classes=10, patch=7)
    task = DiffusionTask(net, Gaussian('straight', 'flow'), optimiser=muon(), lr=constant(5e-3))
    data = partial(batches, fashion_mnist(), 8, Rng(0), transforms=[floats])
    return fit(task, data, steps, folder=folder and tmp/folder, averages=dict(ema=halflife(100, .5)), bar=False, save_every=every or steps)

def test_stopped_and_resumed_bit_for_bit(tmp_path):
    whole = run(tmp_path, 6, 'a')
    run(tmp_path, 3, 'b')
    parts = run(tmp_path, 6, 'b')
    for (k,p),q in zip(whole.task.net.named_parameters(), parts.task.net.parameters()): assert torch.equal(p, q), k
    for p,q in zip(whole.emas['ema'].avg.values(), parts.emas['ema'].avg.values()): assert torch.equal(p, q)
    a, b = whole.opt, parts.opt
    assert isinstance(b, Muon) and any(g['turn'] for g in b.param_groups)
    for p,q in zip((p for g in a.param_groups for p in g['params']), (p for g in b.param_groups for p in g['params'])):
        assert a.state[p].keys()==b.state[q].keys()
        for k in a.state[p]: assert torch.equal(a.state[p][k], b.state[q][k])

def test_closure_and_what_has_no_gradient():
    net = nn.Linear(16, 16)
    opt, was = muon()(net), net.weight.detach().clone()
    opt.step()
    assert torch.equal(net.weight, was)
    assert opt.step(lambda: net(torch.ones(1, 16)).sum()).requires_grad
