"""A weighting of the loss that learns (`weight=learned()`): trained, averaged, saved and resumed with the network, and left behind when it is loaded."""
import math
from functools import partial
import pytest, torch
from diffnb.core import create
from diffnb.data.images import Images, batches, floats
from diffnb.process.gaussian import Gaussian
from diffnb.rng import Rng
from diffnb.samplers import sample
from diffnb.store import load_json, load_tensors
from diffnb.train.checkpoint import checkpoint_in, load_denoiser, load_weights
from diffnb.train.ema import averaged, draw_samples, halflife
from diffnb.train.loop import fit
from diffnb.train.task import DiffusionTask, adam
from diffnb.weights import learned

IMAGES = Images(torch.randint(0, 256, (40, 4, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8), torch.arange(40)%3, ('a', 'b', 'c'))
AVG = dict(ema=halflife(30), long=halflife(300))

def net():
    torch.manual_seed(0)
    return create('dit_tiny', size=8)

def task(weight): return DiffusionTask(net(), Gaussian('straight', 'flow', weight), optimiser=adam(), lr=lambda n: 1e-2)

def go(steps, folder=None, weight=None, **kw):
    data = partial(batches, IMAGES, 12, Rng(0), transforms=(floats,))
    return fit(task(learned(dim=16) if weight is None else weight), data, steps, folder, averages=AVG, bar=False, **kw)

def bits(run):
    out = {f'net/{k}': v for k,v in run.task.net.state_dict().items()}
    out |= {f'{n}/{k}': v for n,e in run.emas.items() for k,v in e.avg.items()}
    return out | {f'opt/{i}/{k}': v for i,s in enumerate(run.opt.state.values()) for k,v in s.items()}

@pytest.fixture(scope='module')
def stopped(tmp_path_factory):
    "Five steps, then five more, in one folder."
    folder = tmp_path_factory.mktemp('run')
    go(5, folder)
    return go(10, folder), folder

def test_resume_bit_for_bit(stopped):
    a, b = bits(go(10)), bits(stopped[0])
    assert a.keys()==b.keys() and any('weight.out' in k for k in a)
    assert all(torch.equal(v, b[k]) for k,v in a.items())

def test_it_learns_and_is_averaged(stopped):
    run, _ = stopped
    u = run.task.process.weight.out.weight
    assert u.abs().max()>1e-3 # it began at 0
    for e in run.emas.values():
        k, = (k for k in e.avg if k.endswith('weight.out.weight') and k.startswith('weight.'))
        assert 0<e.avg[k].abs().max() and not torch.equal(e.avg[k], u)

def test_where_it_comes_to_rest():
    "With an error of 4 at every time, exp(-u)*4+u is least at u = ln 4: the learned log-variance is the error's logarithm."
    p, x0 = Gaussian('straight', 'flow', w := learned(dim=16)), Rng(0).normal(64, 1, dtype=torch.float64)
    opt, t = torch.optim.Adam(w.parameters(), 3e-2), (torch.arange(64, dtype=torch.float64)+.5)/64
    def call(x, net_t): # off by 2 everywhere
        a, b = p.pred.target(*p.schedule.wide(t, x0))
        return a*x0+b*Rng(3).at('corrupt').normal(like=x0)+2
    for _ in range(400):
        opt.zero_grad()
        p.loss(call, x0, t, rng=Rng(3)).value.mean().backward()
        opt.step()
    assert (w.added(p, t)-math.log(4)).abs().mean()<.05
    assert (w(p, t)*4-1).abs().mean()<.05 # every time counts as much as every other

def test_without_parameters_the_network_is_all(tmp_path):
    run = go(1, tmp_path, weight=lambda process, t: torch.ones_like(t))
    assert run.task.net is run.task.denoiser
    frozen = learned(dim=16).requires_grad_(False)
    assert task(frozen).net.__class__ is net().__class__

def test_the_network_loads_alone(stopped):
    run, folder = stopped
    path = checkpoint_in(folder)
    assert load_json(path/'state.json')['parts']==['denoiser', 'weight']
    assert any(k.startswith('weight.') for k in load_tensors(path/'model.safetensors')[0])
    for name in (None, *AVG):
        got = load_denoiser(folder, name)
        want = run.task.net if name is None else averaged(run.task.net, run.emas[name])
        assert not got.training and got.state_dict().keys()==want['denoiser'].state_dict().keys()
        assert all(torch.equal(v, got.state_dict()[k]) for k,v in want['denoiser'].state_dict().items())
    raw, ema = load_denoiser(folder, None), load_denoiser(folder)
    assert any(not torch.equal(a, b) for a,b in zip(raw.parameters(), ema.parameters()))
    with pytest.raises(ValueError, match="no average 'lang'.*long"): load_denoiser(folder, 'lang')

def test_all_of_it_loads_again(stopped):
    run, folder = stopped
    other = task(learned(dim=16))
    load_weights(folder, other.net, None)
    assert all(torch.equal(v, other.net.state_dict()[k]) for k,v in run.task.net.state_dict().items())
    with pytest.raises(ValueError, match='is missing'): load_weights(folder, net(), None) # the parts are not guessed

def test_samples_of_an_average(stopped):
    run, folder = stopped
    cond = dict(y=torch.zeros(2, dtype=torch.long))
    *_, want = sample(load_denoiser(folder), run.task.process, (2, 4, 8, 8), steps=3, rng=Rng(0, 'samples'), cond=cond)
    assert torch.equal(draw_samples(run.task, run.emas['ema'], (2, 4, 8, 8), steps=3, cond=cond), want)

def test_a_recipe_can_ask_for_it():
    "`process: {weight: {name: learned, ...}}`, checked and built; its parameters reach the optimiser."
    from diffnb.recipes import build, check, read
    tree = read('emoji')
    tree['process'] = {**tree['process'], 'weight': {'name': 'learned', 'base': 'min_snr', 'dim': 8}}
    t = build(check(tree, ['--train.device=cpu'])).task
    assert sorted(t.net)==['denoiser', 'weight'] and t.process.weight.out.weight.shape==(1, 8)
    assert any(p is t.process.weight.out.weight for g in t.optimiser(t.net).param_groups for p in g['params'])
    plain = build(check(read('emoji'), ['--train.device=cpu'])).task
    assert plain.net is plain.denoiser
    tree['process']['weight'] = {'name': 'learned', 'base': 'min_snir'}
    with pytest.raises(ValueError, match='min_snir.*min_snr'): check(tree)
