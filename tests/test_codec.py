"Codecs: nothing is lost on the way there and back, bad input is refused, token vectors do not collapse."
import inspect, math
import pytest, torch
from hypothesis import given, settings, strategies as st
import diffnb.codec.core
from diffnb.codec.core import Codec, Pixels, TokenCodec, pixels, token_codec
from diffnb.core import create
from diffnb.process.gaussian import Gaussian
from diffnb.rng import Rng
from diffnb.tokens import narrow
from torch.nn import functional as F

presets = {k: f for k,f in vars(diffnb.codec.core).items() if getattr(f, 'kind', None)=='codec'}
sizes = dict(token_codec=dict(vocab=9, dim=6))

@pytest.mark.parametrize('name', presets)
def test_every_codec(name):
    c = create(name, kind='codec', **sizes.get(name, {}))
    assert isinstance(c, Codec) and isinstance(c, torch.nn.Module)
    assert c.preset==dict(kind='codec', name=name, kw=sizes.get(name, {}))
    again = create(c.preset['name'], kind='codec', **c.preset['kw'])
    assert all(torch.equal(a, b) for a,b in zip(c.state_dict().values(), again.state_dict().values()))
    x = torch.randint(0, 9, (2, 5), generator=torch.Generator().manual_seed(0)) if name=='token_codec' else \
        torch.randint(0, 256, (2, 3, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    z = c.encode(x)
    assert z.is_floating_point() and len(z)==len(x)
    assert torch.equal(c.decode(z), x) and c.decode(z).dtype==x.dtype

def test_the_base_says_what_is_missing():
    class Half(Codec): pass
    for f in (Half().encode, Half().decode):
        with pytest.raises(NotImplementedError, match='Half has no'): f(torch.zeros(1))
    assert Half().loss(torch.zeros(1), torch.zeros(1)) is None and pixels().loss(torch.zeros(1), torch.zeros(1)) is None

# --- pixels ---
def test_all_bytes_come_back():
    x = torch.arange(256, dtype=torch.uint8).reshape(2, 2, 8, 8)
    z = pixels().encode(x)
    assert z.dtype==torch.float32 and z.min()==-1 and z.max()==1
    assert torch.equal(pixels().decode(z), x) and torch.equal(pixels().decode(z.double()), x)
    for dtype in (torch.float32, torch.float64):
        z = pixels().encode(x.to(dtype)/255)
        assert z.dtype==dtype and torch.equal(pixels().decode(z), x)
        assert torch.allclose(z.float(), pixels().encode(x), atol=1e-6)

@settings(max_examples=50, deadline=None)
@given(step=st.floats(-.49, .49), seed=st.integers(0, 99))
def test_less_than_half_a_step_changes_nothing(step, seed):
    x = Rng(seed).integers(256, 1, 1, 5, 5).to(torch.uint8)
    assert torch.equal(pixels().decode(pixels().encode(x)+step/127.5), x)

def test_overshoot_is_clamped():
    z = torch.tensor([-9., -1.001, 1.001, math.inf]).reshape(1, 1, 2, 2)
    assert pixels().decode(z).flatten().tolist()==[0, 0, 255, 255]

@pytest.mark.parametrize('x,error,what', [
    (torch.zeros(3, 4, 4), ValueError, r'\(b,c,h,w\)'), (torch.zeros(1, 1, 2, 2).long(), TypeError, 'int64'),
    (-torch.ones(1, 1, 2, 2), ValueError, '-1'), (255*torch.ones(1, 1, 2, 2), ValueError, '255'),
    (torch.full((1, 1, 2, 2), math.nan), ValueError, 'nan'), (torch.zeros(1, 1, 2, 2).bool(), TypeError, 'bool')])
def test_images_that_are_refused(x, error, what):
    encode = inspect.unwrap(Pixels.encode) # without the annotations' own checks: users have none
    with pytest.raises(error, match=what): encode(pixels(), x)

def test_vectors_that_are_no_images():
    decode = inspect.unwrap(Pixels.decode)
    with pytest.raises(ValueError, match='NaN'): decode(pixels(), torch.full((1, 1, 2, 2), math.nan))
    with pytest.raises(TypeError, match='uint8'): decode(pixels(), torch.zeros(1, 1, 2, 2, dtype=torch.uint8))

# --- tokens ---
@settings(max_examples=30, deadline=None)
@given(vocab=st.integers(1, 400), dim=st.integers(8, 48), scale=st.floats(.02, 50), seed=st.integers(0, 99))
def test_exact_vectors_are_read_without_error(vocab, dim, scale, seed):
    c = token_codec(vocab, dim, scale, seed=seed)
    x = torch.arange(vocab)[None]
    z = c.encode(x)
    assert z.shape==(1, vocab, dim) and torch.equal(c.decode(z), x)
    assert torch.allclose(z.square().mean(-1).sqrt(), torch.full((1, vocab), scale), rtol=1e-5)
    assert torch.equal(c.decode(.37*z), x) # an estimate that is shrunk towards 0 reads the same

def test_a_real_vocabulary():
    c = token_codec(30522, 16)
    x = torch.arange(0, 30522, 37)[None]
    assert torch.equal(c.decode(c.encode(x)), x)

@pytest.mark.parametrize('scale', [.5, 1., 3.])
def test_reading_is_the_nearest_row_and_bayes_rule(scale):
    c = token_codec(50, 8, scale).double()
    z = scale*Rng(1).normal(4, 6, 8, dtype=torch.float64)
    rows = c.encode(torch.arange(50)[None])[0]
    gaps = (z[...,None,:]-rows).square().sum(-1)
    assert torch.equal(c.decode(z), gaps.argmin(-1))
    assert torch.allclose(c.logits(z).softmax(-1), (-gaps/2).softmax(-1), rtol=1e-10)

def test_the_variance_of_a_sequence_matches_the_noise():
    z = token_codec(1000, 64).encode(Rng(0).integers(1000, 8, 128))
    x_1 = Gaussian('cosine', 'v').corrupt(z, torch.tensor([.5]), rng=Rng(1))[0]
    assert abs(z.std()-1)<.02 and abs(x_1.std()-1)<.02 and abs(z.mean())<.05

def test_dtypes():
    c, x = token_codec(20, 8), torch.arange(20)[None]
    for kind in (torch.int32, torch.int16): assert torch.equal(c.encode(x.to(kind)), c.encode(x))
    assert c.logits(c.encode(x).bfloat16()).dtype==torch.float32 and c.logits(c.encode(x).double()).dtype==torch.float64
    assert torch.equal(c.decode(c.encode(x).bfloat16()), x)
    assert torch.equal(c.to(torch.bfloat16).decode(c.encode(x)), x)

def test_one_table_reads_and_writes():
    c = token_codec(20, 8)
    assert list(c.state_dict())==['rows'] and len(list(c.parameters()))==1
    x = torch.tensor([[3, 4]])
    before = c.encode(x)
    with torch.no_grad(): c.rows[3] += 1
    assert not torch.equal(c.encode(x)[0,0], before[0,0]) and torch.equal(c.encode(x)[0,1], before[0,1])
    assert torch.equal(c.decode(c.encode(x)), x)

def test_learned_or_fixed():
    x = torch.tensor([[3, 4]])
    assert not token_codec(20, 8, learn=False).encode(x).requires_grad
    c = token_codec(20, 8)
    c.encode(x).sum().backward()
    g = c.rows.grad
    assert g[[3, 4]].abs().sum()>0 and g[[i for i in range(20) if i not in (3, 4)]].abs().max()==0
    assert (g*c.rows).sum(-1).abs().max()<1e-5 # along the sphere
    assert torch.equal(token_codec(30, 8).rows[:20], token_codec(20, 8).rows) # a longer vocabulary keeps its beginning
    assert not torch.equal(token_codec(20, 8, seed=1).rows, token_codec(20, 8).rows)

def test_the_loss_is_cross_entropy_per_token():
    c, x = token_codec(7, 5), torch.tensor([[3, 4, 0], [6, 6, 1]])
    z = Rng(2).normal(2, 3, 5)
    want = -c.logits(z).log_softmax(-1).gather(-1, x[...,None])[...,0]
    got = c.loss(x, z)
    assert got.shape==(2, 3) and got.dtype==torch.float32 and torch.allclose(got, want, atol=1e-6)
    with torch.no_grad(): c.rows[:] = c.rows[:1]
    assert torch.allclose(c.loss(x, c.encode(x)), torch.full((2, 3), math.log(7)), atol=1e-5)

@pytest.mark.parametrize('x,error,what', [
    (torch.tensor([[0, 1], [2, 9]]), ValueError, r'token 9 at \[1, 1\]'), (torch.tensor([[-1]]), ValueError, 'token -1'),
    (torch.zeros(1, 2), TypeError, 'float32'), (torch.zeros(1, 2).bool(), TypeError, 'bool')])
def test_tokens_that_are_refused(x, error, what):
    with pytest.raises(error, match=what): inspect.unwrap(TokenCodec.encode)(token_codec(9, 4), x)

def test_other_things_that_are_refused():
    with pytest.raises(ValueError, match='4 components'): token_codec(9, 4).decode(torch.zeros(1, 2, 5))
    for kw in (dict(vocab=0), dict(dim=0), dict(scale=0.), dict(scale=-1.), dict(scale=math.inf), dict(scale=math.nan)):
        with pytest.raises(ValueError, match='positive'): token_codec(**{**dict(vocab=9, dim=4), **kw})

def row_spread(c):
    e = c.vectors(c.rows.detach())
    return (e-e.mean(0)).square().mean().item()

@pytest.mark.parametrize('anchor,kept', [(0., False), (1., True)])
def test_vectors_collapse_only_without_the_loss(anchor, kept):
    torch.manual_seed(0)
    c, process, x = token_codec(8, 16), Gaussian('cosine', 'x0'), Rng(0).integers(8, 32, 12)
    net = torch.nn.Sequential(torch.nn.Linear(17, 64), torch.nn.SiLU(), torch.nn.Linear(64, 16))
    def call(x, net_t): return net(torch.cat([x, net_t.float()[:,None,None].expand(32, 12, 1)], -1))
    opt, start = torch.optim.Adam([*net.parameters(), *c.parameters()], lr=2e-2), row_spread(c)
    for i in range(200):
        z, rng = c.encode(x), Rng(0, step=i)
        loss = process.loss(call, z, rng.at('t').uniform(32), rng=rng).value.mean()+anchor*c.loss(x, z).mean()
        opt.zero_grad(); loss.backward(); opt.step()
    assert (row_spread(c)>.1*start)==kept

# --- what a sampler does with an estimate
def test_snap_is_the_nearest_row_or_a_mean_of_likely_ones():
    c, z = token_codec(20, 8), Rng(0).normal(3, 5, 8)
    rows = c.encode(torch.arange(20)[None])[0]
    assert torch.allclose(c.snap()(z), c.encode(c.decode(z)), atol=1e-5)
    assert torch.allclose(c.snap(narrow())(z), c.logits(z).softmax(-1)@rows, atol=1e-5)
    best, i = c.logits(z).topk(3)
    assert torch.allclose(c.snap(narrow(k=3))(z), (best.softmax(-1)[...,None]*rows[i]).sum(-2), atol=1e-5)
    assert c.snap()(z.double()).dtype==torch.float64 and c.snap()(z.bfloat16()).dtype==torch.bfloat16
    x = torch.arange(20)[None]
    assert torch.equal(c.decode(c.snap()(c.encode(x))), x)

def test_choose_draws_by_the_logits():
    c = token_codec(6, 8)
    z = (.3*Rng(1).normal(1, 1, 8)).expand(2000, 10, 8)
    for how in (narrow(), narrow(temperature=2.), narrow(k=2), narrow(p=.6)):
        want = how(c.logits(z[0]))[0].softmax(-1)
        share = c.choose(z, how, Rng(2)).flatten().bincount(minlength=6)/20000
        assert (share-want).abs().max()<.015 # 20,000 draws: sd at most .0035
        assert (share[want==0]==0).all()
    for how in (narrow(k=1), narrow(temperature=0)): assert torch.equal(c.choose(z[:4], how), c.decode(z[:4]))
    a = c.choose(z[:8], rng=Rng(3).of(range(8)))
    assert torch.equal(c.choose(z[2:5], rng=Rng(3).of(range(2, 5))), a[2:5]) and not torch.equal(a, c.choose(z[:8], rng=Rng(4)))
    assert c.choose(z[:2,0])[:, None].shape==(2, 1)

def test_the_anchor_is_cross_entropy_of_the_estimate():
    c, x = token_codec(7, 9), torch.tensor([[3, 4, 0], [6, 6, 1]])
    z, x0 = Rng(2).normal(2, 3, 9), c.encode(x)
    for tau in (None, 2.):
        want = -(c.logits(z)/(tau or 3)).log_softmax(-1).gather(-1, x[...,None])[...,0]
        assert torch.allclose(c.anchor(.5, tau)(z, x0), .5*want, atol=1e-6)
    c.anchor()(z, x0).sum().backward()
    assert c.rows.grad.abs().sum()>0 # the same table writes, reads and learns
    p = Gaussian('cosine', 'x0', anchor=c.anchor())
    got, plain = (q.loss(lambda x, net_t: x/2, x0.detach(), torch.full((2,), .5), rng=Rng(3)).value for q in (p, Gaussian('cosine', 'x0')))
    x_t = p.corrupt(x0.detach(), torch.full((2,), .5), rng=Rng(3))[0]
    assert torch.allclose(got-plain, c.anchor()(x_t/2, x0)[...,None].expand_as(got), atol=1e-5)

def test_the_clean_function_of_a_process():
    c = token_codec(12, 8)
    p = Gaussian('cosine', 'x0', clean=c.snap())
    x_t, t = Rng(0).normal(2, 4, 8), torch.tensor([.6])
    est = p.estimate(lambda x, net_t: x/2, x_t, t)
    alpha, sigma = p.schedule.at(t, x_t)
    assert torch.allclose(est.x0, c.encode(c.decode(x_t)), atol=1e-5) and torch.allclose(alpha*est.x0+sigma*est.eps, x_t, atol=1e-5)
