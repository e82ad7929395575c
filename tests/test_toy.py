"Toy data are what they say, and the closed forms agree with integrals, gradients and enumeration done another way."
import itertools, math
import pytest, torch
from diffnb.core import create
from diffnb.data import toy
from diffnb.data.toy import GaussianData, Mixture, TinyLanguage, checkers, cyclic_text, is_cyclic, on_checkers, rings, shapes, tiny_language

F64 = torch.float64
NAMES = dict(rings=2, checkers=8, shapes=4, cyclic_text=8)

# --- data sets ---
@pytest.mark.parametrize('name', NAMES)
def test_dataset(name):
    "Labels balanced to one, seeds respected, global randomness untouched, batches with their global indices."
    state = torch.random.get_rng_state()
    x, y = data = create(name, kind='dataset', n=101)
    again, other = create(name, kind='dataset', n=101), create(name, kind='dataset', n=101, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert getattr(toy, name).facts['labels']==NAMES[name]
    count = y.bincount()
    assert len(x)==len(y)==101 and len(count)==NAMES[name] and count.max()-count.min()<=1
    assert torch.equal(x, again.x) and torch.equal(y, again.y) and not torch.equal(x, other.x)
    assert not any(torch.equal(y, o) for o in (y.sort().values, torch.arange(101)%NAMES[name])), 'labels are in random order'
    b = data.batch([5, 0, 100])
    assert sorted(b)==['cond', 'idx', 'x'] and b['idx'].tolist()==[5, 0, 100]
    assert torch.equal(b['x'], x[[5, 0, 100]]) and torch.equal(b['cond']['y'], y[[5, 0, 100]])
    with pytest.raises(ValueError, match='at least one'): create(name, kind='dataset', n=0)

def test_rings():
    x, y = rings(20_000)
    r = x.norm(dim=1)
    for k in (0, 1): assert abs(r[y==k].mean()-(.5+.5*k))<.002 and abs(r[y==k].std()-.04)<.002
    turn = (torch.atan2(x[:,1], x[:,0])/(2*math.pi)+.5).mul(8).long().clamp(max=7).bincount()/20_000
    assert (turn-1/8).abs().max()<4*(1/8*7/8/20_000)**.5

def test_checkers():
    x, y = checkers(20_000)
    assert on_checkers(x).all() and x.abs().max()<=1
    col, row = ((x+1)*2).floor().long().T
    assert torch.equal(row, y//2) and set(zip(row.tolist(), col.tolist()))=={(r, c) for r in range(4) for c in range(4) if (r+c)%2==0}
    assert (x.mean(0).abs()<4*.6/20_000**.5).all()
    dark = on_checkers(torch.tensor([[-.9, -.9], [-.4, -.9], [.9, .9], [1.1, 1.1], [-.9, -1.1], [.9, -.9]]))
    assert dark.tolist()==[True, False, True, False, False, False]

@pytest.mark.parametrize('size', [6, 8, 16])
def test_shapes(size):
    "Area by class as the inequalities say, inside the frame, both ends of the range reached."
    x, y = shapes(1600, size=size)
    assert x.shape==(1600, 1, size, size) and x.dtype==torch.float32 and x.min()==-1 and x.max()==1
    share = (x+1).mean((1, 2, 3))/2
    side = 2*(.25+.15*torch.linspace(0, 1, 10_000, dtype=F64))
    fill = torch.tensor([.81, math.pi/4, .51, .5])                     # of the square that the shape fills
    got = torch.stack([share[y==k].mean() for k in range(4)])
    assert (got/(fill*(side**2).mean())-1).abs().max()<.03
    if size>=8: assert (share>0).all()
    rows = (x[y==3][:,0]+1).sum(2)                                     # a triangle is wider below
    width = torch.stack([r[r>0][:2].sum()-r[r>0][-2:].sum() for r in rows])
    assert (width<0).float().mean()>.95
    with pytest.raises(ValueError, match='6 pixels'): shapes(4, size=5)

def test_shapes_inside():
    "Nothing is cut off: no shape has less mass than the smallest whole one, nor more than the largest."
    x, y = shapes(600, size=32)
    mass = (x+1).sum((1, 2, 3))/2
    for k,fill in enumerate([.81, math.pi/4, .51, .5]):
        assert mass[y==k].min()>.96*fill*16**2 and mass[y==k].max()<1.04*fill*25.6**2

def test_cyclic():
    x, y = cyclic_text(500, length=9, vocab=5)
    assert x.dtype==torch.long and 0<=x.min() and x.max()==4
    assert is_cyclic(x, 5).all() and is_cyclic(x, 5, step=y).all() and not is_cyclic(x, 5, step=(y+1)%5).any()
    start = x[:,0].bincount()/500
    assert (start-.2).abs().max()<4*(.2*.8/500)**.5
    every = torch.cartesian_prod(*[torch.arange(4)]*4)
    good = {tuple((s+k*i)%4 for i in range(4)) for s in range(4) for k in range(4)}
    assert [tuple(o) in good for o in every.tolist()]==is_cyclic(every, 4).tolist() and len(good)==16

def test_cyclic_changed():
    "One changed token, a mask or an id outside the vocabulary breaks a sentence, wherever it stands."
    x = cyclic_text(64).x
    for i in range(16):
        for new in (lambda o: (o+1)%8, lambda o: torch.full_like(o, 8), lambda o: o-8, lambda o: o+8):
            bad = x.clone()
            bad[:,i] = new(x[:,i])
            assert not is_cyclic(bad).any()

# --- oracles ---
G = GaussianData(torch.tensor([.5, -1.]), cov=torch.tensor([[1., .6], [.6, .5]]))
M = Mixture(torch.tensor([[-1., 0.], [1., .5], [0., 2.]]), torch.tensor([.3, .2, .5]), torch.tensor([2., 1., 1.]))
COV3 = torch.tensor([[1., .6, .2], [.6, .8, -.3], [.2, -.3, .5]], dtype=F64) # in 2-D the matrix of axes can equal its transpose
G3 = GaussianData(torch.tensor([.5, -1., .3]), cov=COV3)
LEVELS = [(1., .01), (.9, .4), (.5, .5), (.05, 1.), (1., 80.)]

def plane(data, x_t, alpha, sigma, n=401, lim=6.):
    "Evidence and posterior mean of one point by summing over a fine grid of clean points: no formula of Gaussians but the noise's."
    o = torch.linspace(-lim, lim, n, dtype=F64)
    x0 = torch.cartesian_prod(o, o)
    noise = -((x_t-alpha*x0)**2).sum(1)/(2*sigma**2)-math.log(2*math.pi*sigma**2)
    w = data.log_prob(x0)+noise+2*math.log(o[1]-o[0])
    return w.logsumexp(0), w.softmax(0)@x0

@pytest.mark.parametrize('data', [G, M], ids=['gaussian', 'mixture'])
@pytest.mark.parametrize('alpha,sigma', [(.9, .4), (.5, .5), (.05, 1.)])
def test_integral(data, alpha, sigma):
    "Bayes' rule on a grid of clean points gives the same evidence and the same mean."
    for x_t in torch.tensor([[.3, -.2], [-1., 1.], [1.5, .5]], dtype=F64):
        log_p, mean = plane(data, x_t, alpha, sigma)
        assert abs(data.log_prob(x_t[None], alpha, sigma)-log_p)<1e-5
        assert (data.posterior_mean(x_t[None], alpha, sigma)[0]-mean).abs().max()<1e-5

def test_density():
    "Against torch's own distributions."
    from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal
    x = 2*torch.randn(200, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    x3, cov = x[:,[0,1,0]]+x[:,[1,0,0]].flip(0), torch.tensor([[1., .6], [.6, .5]], dtype=F64)
    for alpha,sigma in [(1., 0.), *LEVELS]:
        eye = sigma**2*torch.eye(2, dtype=F64)
        assert torch.allclose(G.log_prob(x, alpha, sigma), MultivariateNormal(alpha*G.mean, alpha**2*cov+eye).log_prob(x), rtol=1e-6)
        noisy = MultivariateNormal(alpha*G3.mean, alpha**2*COV3+sigma**2*torch.eye(3, dtype=F64))
        assert torch.allclose(G3.log_prob(x3, alpha, sigma), noisy.log_prob(x3), rtol=1e-6)
        parts = MultivariateNormal(alpha*M.means, alpha**2*M.stds[:,None,None]**2*torch.eye(2, dtype=F64)+eye)
        want = MixtureSameFamily(Categorical(torch.tensor([.5, .25, .25], dtype=F64)), parts).log_prob(x)
        assert torch.allclose(M.log_prob(x, alpha, sigma), want, rtol=1e-6)

@pytest.mark.parametrize('data', [G3, M], ids=['gaussian', 'mixture'])
@pytest.mark.parametrize('alpha,sigma', LEVELS)
def test_tweedie(data, alpha, sigma):
    x = (alpha**2+sigma**2)**.5*2*torch.randn(200, 3 if data is G3 else 2, dtype=F64, generator=torch.Generator().manual_seed(1))
    x.requires_grad_()
    grad, = torch.autograd.grad(data.log_prob(x, alpha, sigma).sum(), x)
    assert torch.allclose(data.score(x, alpha, sigma), grad, rtol=1e-9)
    assert torch.allclose(data.posterior_mean(x, alpha, sigma), (x+sigma**2*grad)/alpha, rtol=1e-7, atol=1e-9)

@pytest.mark.parametrize('data', [G, M], ids=['gaussian', 'mixture'])
def test_ends(data):
    "Finite at sigma = 0 and at alpha = 0, and far from all data; both 0 is refused."
    x = torch.randn(50, 2, dtype=F64, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(data.posterior_mean(x, .25, 0), x/.25)
    mean = data.mean if data is G else data.weights@data.means
    assert torch.allclose(data.posterior_mean(x, 0, 1), mean.expand(50, 2))
    for o in (1e3, 1e6):
        for alpha,sigma in [(1, 0), *LEVELS]:
            far = torch.full((1, 2), o, dtype=F64)
            assert data.posterior_mean(far, alpha, sigma).isfinite().all() and data.score(far, alpha, sigma).isfinite().all()
            assert data.log_prob(far, alpha, sigma).isfinite().all()
    with pytest.raises(ValueError, match='both 0'): data.posterior_mean(x, 0, 0)

@pytest.mark.parametrize('data', [G, M], ids=['gaussian', 'mixture'])
def test_shapes_of_time(data):
    "A number, (), (b,) and (b,1) mean the same; the dtype is x's, the arithmetic float64."
    x = torch.randn(3, 2, dtype=F64, generator=torch.Generator().manual_seed(3))
    a, s = torch.tensor([.9, .5, .1], dtype=F64), torch.tensor([.4, .5, 1.], dtype=F64)
    rows = torch.cat([data.posterior_mean(x[i:i+1], a[i].item(), s[i]) for i in range(3)])
    for o in ((a, s), (a[:,None], s[:,None])): assert torch.allclose(data.posterior_mean(x, *o), rows)
    low = data.posterior_mean(x.float(), a, s)
    assert low.dtype==torch.float32 and data.score(x.float(), a, s).dtype==torch.float32
    assert torch.equal(low, data.posterior_mean(x.float().double(), a, s).float()) and data.log_prob(x.float()).dtype==F64

def test_samples():
    "Mean, covariance, shares of the parts; the same seed gives the same draw."
    n = 40_000
    x = G3.sample(n)
    assert x.dtype==F64 and (x.mean(0)-G3.mean).abs().max()<4/n**.5
    assert (x.T.cov()-COV3).abs().max()<4*2**.5/n**.5
    x = M.sample(n)
    part = torch.cdist(x, M.means).div(M.stds).argmin(1)               # parts hardly overlap
    assert (part.bincount()/n-M.weights).abs().max()<.02
    want = torch.einsum('k,kd,ke->de', M.weights, M.means, M.means)+(M.weights@M.stds**2)*torch.eye(2, dtype=F64)
    assert (x.T@x/n-want).abs().max()<4*3/n**.5
    for o in (G, M): assert torch.equal(o.sample(5, seed=7), o.sample(5, seed=7)) and not torch.equal(o.sample(5, seed=7), o.sample(5, seed=8))

def test_flow():
    "Against the ODE dx/dt = (ln alpha)' x + ... integrated by a fourth-order method, and as a group: there and back."
    f = lambda t: (math.cos(t*math.pi/2), math.sin(t*math.pi/2))
    def slope(x, t):                                                   # x' = alpha' x0_hat + sigma' eps_hat
        a, s = f(t)
        x0 = G3.posterior_mean(x, a, s)
        return math.pi/2*(-s*x0+a*(x-a*x0)/s)
    x = start = torch.randn(20, 3, dtype=F64, generator=torch.Generator().manual_seed(4))
    n = 200
    ts = torch.linspace(.99, .05, n+1, dtype=F64).tolist()
    for t,s in zip(ts, ts[1:]):
        h = s-t
        k1 = slope(x, t); k2 = slope(x+h/2*k1, t+h/2); k3 = slope(x+h/2*k2, t+h/2); k4 = slope(x+h*k3, s)
        x = x+h/6*(k1+2*k2+2*k3+k4)
    end = G3.flow(start, *f(.99), *f(.05))
    assert (end-x).abs().max()<1e-7
    assert torch.allclose(G3.flow(end, *f(.05), *f(.99)), start)

def test_refused():
    for cov,word in [([[1., 2.], [2., 1.]], 'eigenvalues'), ([[1., .5], [0., 1.]], 'symmetric')]:
        with pytest.raises(ValueError, match=word): GaussianData(torch.zeros(2), cov=torch.tensor(cov))
    with pytest.raises(ValueError, match='eigenvalues'): GaussianData(torch.zeros(2), std=0)
    with pytest.raises(ValueError, match='weights'): Mixture(torch.zeros(2, 2), weights=torch.tensor([1., 0.]))

# --- the language that is enumerated ---
def test_reference_language():
    "Entropy, cross-entropy of the product of marginals and its distance: the numbers of the table with seed 0."
    p = tiny_language().p
    m = [p.sum((1, 2)), p.sum((0, 2)), p.sum((0, 1))]
    q = torch.einsum('i,j,k->ijk', *m)
    got = [-(p*p.log()).sum(), -(p*q.log()).sum(), (p-q).abs().sum()/2]
    assert [round(o.item(), 4) for o in got]==[2.9637, 3.16, .2418]

@pytest.mark.parametrize('lang', [tiny_language(), tiny_language(seed=1, vocab=2, length=4)], ids=['3 of 3', '4 of 2'])
def test_conditionals(lang):
    "Every masking of every sentence, by loops over the table."
    v, n = lang.vocab, lang.length
    all_x = torch.tensor(list(itertools.product(range(v+1), repeat=n)))
    got = lang.conditionals(all_x).exp()
    for x,row in zip(all_x.tolist(), got):
        want = torch.zeros(n, v, dtype=F64)
        for s in itertools.product(range(v), repeat=n):
            if all(a in (b, v) for a,b in zip(x, s)):
                for i,w in enumerate(s): want[i,w] += lang.p[s]
        assert torch.allclose(row, want/want.sum(1, keepdim=True), atol=1e-14)
    assert got.dtype==F64 and torch.equal(lang(all_x, torch.zeros(1), y=None), lang.conditionals(all_x))

def test_language_chain():
    "Any order of uncovering multiplies to P; probabilities sum to one; samples have the table's frequencies."
    lang = tiny_language(seed=5)
    s = lang.sentences
    assert abs(lang.log_prob(s).exp().sum()-1)<1e-12 and len(s)==27
    for order in itertools.permutations(range(3)):
        x, total = torch.full_like(s, lang.mask_id), 0.
        for i in order:
            total = total+lang.conditionals(x)[torch.arange(27),i,s[:,i]]
            x[:,i] = s[:,i]
        assert (total-lang.log_prob(s)).abs().max()<1e-12
    x = lang.sample(40_000)
    freq = (x*torch.tensor([9, 3, 1])).sum(1).bincount(minlength=27)/40_000
    p = lang.p.flatten()
    assert ((freq-p).abs()<4.5*(p*(1-p)/40_000).sqrt()).all()
    assert not torch.equal(lang.p, tiny_language().p) and torch.equal(lang.p, tiny_language(seed=5).p)

def test_language_refused():
    with pytest.raises(ValueError, match='one length'): TinyLanguage(torch.ones(3, 2))
    with pytest.raises(ValueError, match='probability 0'): TinyLanguage(torch.tensor([[.5, .5], [0., 0.]]))
    with pytest.raises(ValueError, match='the mask'): tiny_language().conditionals(torch.tensor([[0, 4, 0]]))
    with pytest.raises(ValueError, match='the mask'): tiny_language().conditionals(torch.tensor([[0, -1, 0]]))
