"""What a sampler's step adds up, in every precision, and the amplitudes that it remembers."""
import functools, math
import pytest, torch
from diffnb.core import combine, presets
from diffnb.data.toy import GaussianData
from diffnb.grids import Grid, edm_grid
from diffnb.process.gaussian import Gaussian
from diffnb.rng import Rng
from diffnb.samplers import ddim, dpmpp_2m, ends, heun, sample
from diffnb.samplers.solvers import churned, unipc

F64 = torch.float64
DATA = GaussianData(torch.tensor([1.5]), .6)
SAMPLERS = presets('sampler')

def last(*a, **k):
    *_, x = sample(*a, **k)
    return x

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float32, F64])
@pytest.mark.parametrize('k', [2, 3, 4, 5])
def test_a_sum_of_many_is_sums_of_two(dtype, k):
    "Bit for bit, so in half precision it loses nothing that pairs do not lose."
    def add(a, x, b, y): return torch.add(x if a==1 else a*x, y, alpha=b)
    xs = Rng(1).normal(k, 3, 700, dtype=dtype)
    for seed in range(4):
        first, *rest = c = [1. if seed==1 else -.7+seed, *(Rng(seed).normal(k)[1:].tolist())]
        want = functools.reduce(lambda sofar, o: add(1., sofar, *o), zip(rest[1:], xs[2:]), add(first, xs[0], rest[0], xs[1]))
        got = combine(*zip(c, xs))
        assert got.dtype==dtype and torch.equal(got, want)

def test_a_sum_takes_the_wider_precision_and_leaves_its_terms_alone():
    x, y = Rng(1).normal(2, 50, dtype=torch.bfloat16), Rng(2).normal(2, 50)
    before = x.clone(), y.clone()
    for terms in (((.5, x), (.25, y)), ((.25, y), (.5, x)), ((1., x), (.25, y)), ((1., y), (2., y), (.5, x))):
        got = combine(*terms)
        assert got.dtype==torch.float32
        assert torch.allclose(got, sum(a*o.float() for a,o in terms), rtol=0, atol=2**-8)
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])

def test_a_sum_does_not_look_at_what_counts_for_nothing():
    bad, x = torch.full((2, 3), math.nan), torch.ones(2, 3)
    for terms in (((0., bad), (2., x)), ((2., x), (0., bad)), ((0., bad), (1., x), (0., bad), (1., x))):
        assert torch.equal(combine(*terms), 2*x)
    assert torch.equal(combine((1., x), (0., bad)), x) and torch.equal(combine((0., x), (0., x)), 0*x)

@pytest.mark.parametrize('dtype,ulp', [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
@pytest.mark.parametrize('p', [Gaussian('straight', 'flow'), Gaussian('scaled_linear', 'v')], ids=['flow', 'v'])
@pytest.mark.parametrize('name', [n for n in SAMPLERS if n!='adaptive']) # whose steps depend on the precision
def test_half_precision(name, p, dtype, ulp):
    "With a network that answers as exactly as the dtype can, ten steps lose a few units in the last place of numbers from 1 to 2."
    exact = p.oracle(DATA.posterior_mean)
    def net(x, t): return exact(x.double(), t).to(x.dtype)
    def run(dtype): return last(net, p, (64, 1), steps=10, step=SAMPLERS[name](), rng=Rng(3), x=start.to(dtype))
    start = Rng(3).normal(64, 1, dtype=dtype)
    got, want = run(dtype), run(torch.float32)
    assert got.dtype==dtype and (got-want).abs().mean()<2*ulp

def in_pieces(step):
    "Each step on a grid of its own, with one state for all of them."
    def alone(process, call, x, grid, i, state, rng):
        return step(process, call, x, Grid(*(o[i:i+2] for o in grid)), 0, state, rng)
    return alone

@pytest.mark.parametrize('step', [ddim(), ddim(1.)], ids=['ddim', 'euler_ancestral'])
def test_amplitudes_belong_to_the_grid(step):
    "A step that is given another grid does not go by the amplitudes of the one before."
    p = Gaussian('scaled_linear', 'v')
    net = p.oracle(DATA.posterior_mean)
    a, b = (last(net, p, (5, 1), steps=8, step=s, rng=Rng(2), dtype=F64) for s in (step, in_pieces(step)))
    assert torch.equal(a, b)

def test_what_is_remembered_is_the_schedule():
    p = Gaussian('edm', 'edm')
    g, state = edm_grid()(p, 6), {}
    want = list(zip(*(o.tolist() for o in p.schedule(g.t))))
    for i in range(6):
        for n in (2, 3, 4): assert ends(p, g, i, state, n)==want[max(i+2-n, 0):i+2]

@pytest.mark.parametrize('inner', [heun(), ddim(), dpmpp_2m(), unipc()], ids=['heun', 'ddim', 'dpmpp_2m', 'unipc'])
def test_churn_gives_back_what_it_found(inner):
    "A churned step sees the risen noise level, and only that step."
    p, seen, kept = Gaussian('edm', 'edm'), [], {}
    net, grid = p.oracle(DATA.posterior_mean), edm_grid()
    def watched(process, call, x, g, i, state, rng):
        seen.append((process.schedule.ksigma(g.t[i]).item(), ends(process, g, i, state)[0][1]))
        return inner(process, call, x, g, i, state, rng)
    def outer(process, call, x, g, i, state, rng):
        x = churned(watched, 40., .05, 50.)(process, call, x, g, i, state, rng)
        kept.update(state)
        return x
    last(net, p, (4, 1), steps=12, step=outer, grid=grid, rng=Rng(1), dtype=F64)
    g = grid(p, 12)
    k = p.schedule.ksigma(g.t).tolist()
    for i,(risen,used) in enumerate(seen):
        assert used==pytest.approx(risen, rel=1e-12)
        assert risen==pytest.approx(k[i]*(math.sqrt(2) if .05<=k[i]<=50 else 1), rel=1e-9)
    assert kept['levels'][1]==list(zip(*(o.tolist() for o in p.schedule(kept['levels'][0]))))
    assert torch.equal(kept['levels'][0], g.t)

@pytest.mark.parametrize('name', SAMPLERS)
def test_what_is_held_is_held_and_the_batch_does_not_matter(name):
    "Inpainting from half way, three samples at once and each alone."
    p = Gaussian('cosine', 'v')
    data = GaussianData(torch.tensor([1.5, 0., -1.]), .6)
    net, keep = p.oracle(data.posterior_mean), torch.tensor([True, False, False]).expand(3, 3)
    known = Rng(9).normal(3, 3, dtype=F64)
    for held in (True, False):
        def run(rows):
            held_ = dict(keep=keep[rows]) if held else {}
            return last(net, p, (len(rows), 3), steps=9, step=SAMPLERS[name](), rng=Rng(4).of(rows), known=known[rows],
                        start=.7, **held_)
        rows = [0, 1, 2]
        whole = run(rows)
        assert torch.isfinite(whole).all() and (not held or torch.equal(whole[:,0], known[:,0]))
        assert (whole-torch.cat([run([r]) for r in rows])).abs().max()<1e-12
