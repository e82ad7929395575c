"""Progressive distillation: two steps as one for every prediction, guided teachers, rounds that go on where they stopped.

Tolerances: identities run in float64, where they hold to rounding.
"""
import copy
from functools import partial
import pytest, torch
from diffnb.core import create, mean_loss
from diffnb.data.images import Images, batches
from diffnb.data.toy import GaussianData
from diffnb.grids import edm_grid, uniform
from diffnb.guidance import constant
from diffnb.process.gaussian import Gaussian
from diffnb.rng import Rng
from diffnb.samplers import ddim, sample
from diffnb.train.distill import Distillation, as_one, distill, listed, two_steps
from diffnb.train.ema import halflife
from diffnb.train.task import DiffusionTask, constant as steady

F64 = torch.float64
PROCESSES = {'flow': Gaussian('straight', 'flow'), 'v': Gaussian('cosine', 'v'), 'eps': Gaussian('linear_beta', 'eps'), 'edm': Gaussian('edm', 'edm'),
             'x0': Gaussian('zero_snr', 'x0')}
def grid_of(name): return edm_grid() if name=='edm' else uniform()

@pytest.mark.parametrize('name', PROCESSES)
def test_as_one(name):
    "A student that gives what it is taught samples as its teacher does, point by point, with half the calls."
    p, d, n = PROCESSES[name], GaussianData(torch.tensor([1.5]), .6), 8
    g = grid_of(name)(p, n)
    call = p.oracle(d.posterior_mean)
    x = p.prior((5, 1), Rng(1), t=g.t[0].item(), dtype=F64)
    taught = {}
    for i in range(0, n, 2):
        t, m, s = (g.t[i+k].expand(5) for k in range(3))
        end = two_steps(p, call, x, t, m, s)
        x0 = as_one(p, x, end, t, s)
        torch.testing.assert_close(p.move(x0, p.eps_of(x, x0, t), s), end, rtol=0, atol=1e-9)
        x = end
    *_, want = sample(call, p, (5, 1), n, ddim(), grid_of(name), x=p.prior((5, 1), Rng(1), t=g.t[0].item(), dtype=F64), dtype=F64)
    torch.testing.assert_close(x, want, rtol=0, atol=1e-9)

def tiny(seed=0):
    torch.manual_seed(seed)
    net = create('diffit_tiny', size=8, ch=1, classes=3)
    for q in net.parameters(): q.data.normal_(0, .2, generator=torch.Generator().manual_seed(q.numel()+seed))
    return net

IMAGES = Images(torch.arange(12*64).remainder(251).view(12, 1, 8, 8).to(torch.uint8), torch.arange(12)%3, ['a', 'b', 'c'])
def floats(batch, rng): return {**batch, 'x': batch['x'].float()/127.5-1}
DATA = partial(batches, IMAGES, 6, Rng(0), transforms=[floats])
def student(net): return DiffusionTask(net, PROCESSES['flow'], lr=steady(1e-3))

def test_loss_is_what_it_says():
    "The loss against the target written out by hand, with a guided teacher; no gradient reaches the teacher."
    p, net, teacher = PROCESSES['flow'], tiny(1), tiny(2)
    g = uniform()(p, 4)
    task = Distillation(student(net), teacher, g, w=3.)
    batch = task.draw(next(DATA(start=0)), Rng(5))
    assert set(batch['place'].tolist())<={0, 2} and torch.equal(batch['t'], g.t[batch['place']])
    got = mean_loss(task.loss(batch, Rng(5)))
    x_t,_ = p.corrupt(batch['x'], batch['t'], rng=Rng(5).of(batch['idx']).at('noise'))
    call = constant(3.)(teacher, batch['cond'])
    t, m, s = (g.t[batch['place']+k] for k in range(3))
    with torch.no_grad(): x0 = as_one(p, x_t, two_steps(p, call, x_t, t, m, s), t, s)
    e = lambda o: o.view(-1, 1, 1, 1).float()
    eps = (x_t-e(1-t)*x0)/e(t)
    want = (net(x_t, t, **batch['cond'])-(eps-x0)).square().mean()
    assert abs(got-want)<1e-4*want
    unguided = mean_loss(Distillation(student(net), teacher, g).loss(batch, Rng(5)))
    assert abs(unguided-got)>1e-3*got                           # guidance counts
    got.backward()
    assert all(q.grad is None for q in teacher.parameters()) and any(q.grad is not None for q in net.parameters())

def test_rounds_go_on(tmp_path):
    "Rounds stopped half-way end with the same bits; grids are nested; the teacher is left alone."
    teacher = tiny()
    before = copy.deepcopy(teacher.state_dict())
    kw = dict(n=8, until=2, bar=False, save_every=2, averages=dict(ema=halflife(50)))
    whole, g = distill(teacher, student, DATA, 4, folder=tmp_path/'whole', **kw)
    assert torch.equal(g.t, uniform()(PROCESSES['flow'], 8).t[::4])
    from diffnb.train.loop import fit
    net = copy.deepcopy(teacher).requires_grad_(True)           # the first round, interrupted after two steps
    fit(Distillation(student(net), copy.deepcopy(teacher), uniform()(PROCESSES['flow'], 8)), DATA, 2, tmp_path/'parts'/'steps-4',
        bar=False, save_every=2, averages=dict(ema=halflife(50)))
    parts, _ = distill(teacher, student, DATA, 4, folder=tmp_path/'parts', **kw)
    for a,b in zip(whole.state_dict().values(), parts.state_dict().values()): assert torch.equal(a, b)
    assert all(torch.equal(v, before[k]) for k,v in teacher.state_dict().items())
    assert any(not torch.equal(v, before[k]) for k,v in whole.state_dict().items())

def test_refused():
    for n,until in ((12, 4), (4, 4), (2, 4)):
        with pytest.raises(ValueError, match='power of two'): distill(tiny(), student, DATA, 1, n=n, until=until)
    with pytest.raises(ValueError, match='even'): Distillation(student(tiny()), tiny(), uniform()(PROCESSES['flow'], 3))
    with pytest.raises(ValueError, match='2 times are listed'): listed([1., .5])(PROCESSES['flow'], 3)

def test_with_a_learned_weighting():
    "The weighting stays as it is: the network alone is trained, and the next teacher is a network."
    from diffnb.train.task import adam
    from diffnb.weights import learned
    p = Gaussian('straight', 'flow', learned(dim=16))
    task = lambda net: DiffusionTask(net, p, optimiser=adam())
    teacher = tiny()
    net, g = distill(teacher, task, DATA, 2, n=4, until=1, bar=False, averages=dict(ema=halflife(50)))
    assert len(g.t)==2 and net.state_dict().keys()==teacher.state_dict().keys()
    assert any(not torch.equal(v, net.state_dict()[k]) for k,v in teacher.state_dict().items())
    assert not p.weight.out.weight.any()
