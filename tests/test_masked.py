"""Masked diffusion on languages small enough to enumerate, with exact conditionals as the network: process, schedules, draws.

Where something is drawn, keys are fixed and bounds are at least three standard deviations (3.5 or more where there are many comparisons).
"""
import itertools, math
import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from diffnb.core import Denoiser, Est, Feats, Loss, create, mean_loss, presets
from diffnb.data.toy import cyclic_text, tiny_language
from diffnb.process.masked import Masked, by_count, by_time
from diffnb.rng import Rng
from diffnb.samplers import sample
from diffnb.schedules import Schedule, cosine, survival, table
from diffnb.survival import (Survival, block_mask, geometric, linear_noise, loglinear, mdlm_cosine, mean_of_texts, nats_per_text, near_context,
    poly, score_entropy, survivals)
from diffnb.tokens import Late, draw, invert, late_head, narrow, rows
from diffnb.weights import stratified, uniform_times

F64 = torch.float64
SCHEDULES = {'straight': survival('straight'), 'cosine': survival(cosine(s=0.)), 'cosine s=.008': survival('cosine'), 'poly(.5)': poly(.5),
             **{k: f() for k,f in survivals.items()}}
each_schedule = pytest.mark.parametrize('s', SCHEDULES.values(), ids=SCHEDULES)
def late_start(s): return s.name in ('geometric', 'bd3_cosine') # some tokens are hidden at t = 0 already

LANG = tiny_language()
S, P = LANG.sentences, LANG.p.flatten()
TRUTH = -LANG.log_prob(S)
H = (P*TRUTH).sum().item()
def masked(s='straight'): return Masked(s, 3, 3)
TINY = masked()
CALL = TINY.oracle(LANG.conditionals)
def steps(T): return masked(survival(table('steps', (1-torch.arange(1, T+1, dtype=F64)/T)**2)))
def uniform_net(v): return lambda x, net_t, **cond: torch.zeros(*x.shape, v, dtype=F64)
def last(*args, **kw): return list(sample(*args, **kw))[-1]

# --- the bound ---
@each_schedule
def test_nelbo_is_the_likelihood(s):
    "Exactly, where all is visible at 0; else the rest is revealed at once there, at a cost that the bound states."
    got = masked(s).exact_nelbo(CALL, S, nodes=100)-TRUTH
    if not late_start(s): assert got.abs().max()<1e-10
    else: assert (P*got).sum()>0 and got.abs().max()<1e-4

def test_bound_of_a_late_start():
    "The exact law of what is produced: all that is hidden at t = 0 is drawn at once."
    s = Survival('late', lambda t: (.6*(1-t), .4+.6*t))
    p = masked()
    p.schedule = Schedule(*s) # far from what `Masked` accepts, so that the effect is large
    words, hidden = p.estimate(CALL, STATES, torch.ones(1)).logits.exp(), (STATES==3)[...,None]
    dist = (STATES==3).all(1).double()
    t = torch.linspace(1, 0, 4001, dtype=F64)
    def move(dist, r): return dist@torch.einsum('xi,xj,xk->xijk', *torch.cat([torch.where(hidden, r, 1.)*words, hidden*(1-r)], -1).unbind(1)).flatten(1)
    for i in range(4000): dist = move(dist, 1-s.fn(t[i+1])[1]/s.fn(t[i])[1])
    real = -move(dist, torch.tensor(1., dtype=F64)).view(4, 4, 4)[:3,:3,:3].flatten().log()
    bound = p.exact_nelbo(CALL, S)
    assert (bound>=real-2e-4).all() and (P*(bound-real)).sum()>1e-3 and (P*bound).sum()>H+1e-3
    got = p.nelbo(CALL, S.repeat(60, 1), 64, by_time, rng=Rng(61)).view(60, 27)
    assert ((got.mean(0)-bound).abs()<4.5*got.std(0)/60**.5).all()

def test_what_the_ends_cost():
    "The integral of the published loglinear falls short by a thousandth of the first step's cost; one from t = 0.001 by as much at the other end."
    def integral(p, lo):
        u,w = (torch.tensor(o) for o in __import__('numpy').polynomial.legendre.leggauss(200))
        t, w, total = lo+(1-lo)*(u+1)/2, w*(1-lo)/2, 0.
        for hide in itertools.product((False, True), repeat=3):
            if not (k := sum(hide)): continue
            nll = (P*TINY.nll(CALL, torch.where(torch.tensor(hide), 3, S), S, torch.ones(1)).sum(1)).sum()
            a,h = p.schedule(t)
            total += (w*p.rate(t)*h**k*a**(3-k)).sum()*nll
        return total/H-1
    assert abs(integral(masked('straight'), 0.))<1e-10
    def mean(x_t): return (P*TINY.nll(CALL, x_t, S, torch.ones(1)).sum(1)).sum()
    first, final = mean(S*0+3), sum(mean(torch.where(torch.arange(3)==i, 3, S)) for i in range(3))
    assert abs(integral(masked('loglinear'), 0.)+1e-3*first/H)<5e-6 and .0007<1e-3*first/H<.0013 # the share with nothing visible
    assert abs(integral(masked('straight'), 1e-3)+1e-3*final/H)<5e-6 and .0007<1e-3*final/H<.0013 # and with a single word hidden

def test_count_form_is_the_likelihood():
    "Every set of k hidden words weighs 1/(k C(3,k)); `by_count` gives each of these sets, and that weight, in the mean."
    want = torch.zeros(27, dtype=F64)
    for hide in itertools.product((False, True), repeat=3):
        if k := sum(hide): want += TINY.nll(CALL, torch.where(torch.tensor(hide), 3, S), S, torch.ones(1)).sum(1)/(k*math.comb(3, k))
    assert (want-TRUTH).abs().max()<1e-10
    u = (torch.arange(60_000, dtype=F64)+.5)/60_000
    hidden,w,t = by_count(TINY, u, torch.ones(60_000, 3, dtype=torch.bool), Rng(1))
    share = (hidden.double()@torch.tensor([4., 2., 1.], dtype=F64)).long().bincount(weights=w, minlength=8)/60_000
    for j in range(1, 8): assert abs(share[j]-1/(j.bit_count()*math.comb(3, j.bit_count())))<.012, (j, share[j])
    assert (hidden.sum(1)==(u*3).floor()+1).all() and torch.allclose(TINY.schedule(t)[1], hidden.sum(1).double()/3)

def test_estimates_have_the_mean_of_the_bound():
    x0 = S.repeat(80, 1)
    for s in ('cosine', 'loglinear', 'linear_noise'):
        for f in (by_time, by_count):
            got = masked(s).nelbo(CALL, x0, 16, f, rng=Rng(2)).view(80, 27)
            z = (got.mean(0)-TRUTH)/got.std(0)*80**.5
            assert z.abs().max()<4.5, (s, f)

@each_schedule
def test_uniform_model(s):
    x0 = cyclic_text(6, length=5).x
    p = Masked(s, 8, 8)
    assert (p.exact_nelbo(uniform_net(8), x0, nodes=100)-5*math.log(8)).abs().max()<1e-10
    assert (p.nelbo(uniform_net(8), x0, 1)-5*math.log(8)).abs().max()<1e-12 # by count without any variance
    assert p.nelbo(uniform_net(8), x0, 1, by_time).std()>.5

def test_wrong_models_pay():
    for seed in range(5):
        wrong = Rng(seed).normal(64, 3, 3, dtype=F64)
        call = TINY.oracle(lambda x: wrong[x@torch.tensor([16, 4, 1])])
        assert (P*TINY.exact_nelbo(call, S)).sum()>H
    other = tiny_language(seed=1)
    assert (P*TINY.exact_nelbo(TINY.oracle(other.conditionals), S)).sum()>H+.1
    assert abs((P*TINY.exact_nelbo(CALL, S)).sum()-H)<1e-10

def test_strata():
    "Each draw of a text lies in its own stratum, and the estimates scatter less for it."
    seen = []
    def spy(process, u, free, rng):
        seen.append(u)
        return by_time(process, u, free, rng)
    TINY.nelbo(CALL, S, 20, spy, rng=Rng(3))
    assert (torch.stack(seen)*20).floor().long().equal(torch.arange(20)[:,None].expand(20, 27))
    x0, p = torch.zeros(64, 32, dtype=torch.long), Masked('straight', 8, 8, lambda process, t, hidden: torch.ones(hidden.shape))
    def spread(times): # of the plain cross-entropy, which grows with t
        return torch.stack([mean_loss(p.loss(uniform_net(8), x0, times(Rng(4, step=i), 64), rng=Rng(5, step=i))) for i in range(60)]).std()
    assert (stratified()(Rng(4), 64)*64).floor().long().sort()[0].equal(torch.arange(64))
    assert spread(stratified())<.5*spread(uniform_times())

def test_perplexity():
    p, x0 = Masked('straight', 8, 8), cyclic_text(6, length=5).x
    keep = torch.arange(5).expand(6, 5)<2
    assert abs(p.perplexity(uniform_net(8), x0, m=1)-8)<1e-12 and abs(p.perplexity(uniform_net(8), x0, m=1, keep=keep)-8)<1e-12
    assert abs(TINY.perplexity(CALL, S, m=200, rng=Rng(6))-math.exp(TRUTH.sum()/81))<.05
    halves = [p.nelbo(uniform_net(8), o, 1, mask=m).sum() for o,m in ((x0[:2], keep[:2]), (x0[2:], keep[2:]))] # corpus, not mean of texts
    assert abs(p.perplexity(uniform_net(8), x0, m=1, mask=keep)-math.exp(sum(halves)/keep.sum()))<1e-10

def test_bound_given_a_prompt():
    keep = (torch.arange(3)==1).expand(27, 3)
    want = TRUTH+LANG.p.sum((0, 2)).log()[S[:,1]]
    assert (TINY.exact_nelbo(CALL, S, keep=keep)-want).abs().max()<1e-10
    got = TINY.nelbo(CALL, S.repeat(80, 1), 32, keep=keep.repeat(80, 1), rng=Rng(3)).view(80, 27)
    assert ((got.mean(0)-want).abs()<4.5*got.std(0)/80**.5+1e-12).all()

def test_loss_has_the_mean_of_the_bound():
    "`loss` at stratified times, summed over positions."
    n = 400
    t = ((torch.arange(n)+.5)/n).to(F64).repeat_interleave(27)
    loss = TINY.loss(CALL, S.repeat(n, 1), t, rng=Rng(4))
    got = loss.value.double().sum(1).view(n, 27)
    assert loss.value.dtype==torch.float32
    assert ((got.mean(0)-TRUTH).abs()<4.5*got.std(0)/n**.5).all()

@each_schedule
def test_weights(s):
    t = torch.linspace(.01, .99, 99, dtype=F64, requires_grad=True)
    sigma = -masked(s).schedule(t)[0].log()
    d, = torch.autograd.grad(sigma.sum(), t)
    w = masked(s).rate(t.detach())
    assert ((d/sigma.expm1()-w)/w).abs().max()<1e-10
    a,h = masked(s).schedule(torch.linspace(0, 1, 1001, dtype=F64))
    first = {'geometric': math.exp(-1e-4), 'bd3_cosine': .999}
    last = {'geometric': math.exp(-20), 'linear_noise': math.exp(-10), 'loglinear': 1e-3, 'mdlm_cosine': 1e-3, 'mdlm_cosine_squared': 1e-3}
    assert (a.diff()<0).all() and (h.diff()>0).all() and (a+h-1).abs().max()<1e-15
    assert abs(a[0]-first.get(s.name, 1))<1e-12 and abs(a[-1]-last.get(s.name, 0))<1e-12

def test_published_formulas():
    t, e = torch.linspace(0, 1, 101, dtype=F64), 1e-3
    c = (math.pi*t/2).cos()
    want = {'loglinear': -torch.log1p(-(1-e)*t), 'geometric': 1e-4**(1-t)*20**t, 'linear_noise': 10*t, 'mdlm_cosine': -(e+(1-e)*c).log(),
            'mdlm_cosine_squared': -(e+(1-e)*c**2).log()}
    for k,sigma in want.items(): assert (survivals[k]().fn(t)[0]-(-sigma).exp()).abs().max()<1e-14, k
    hidden = {'md4_cosine': (math.pi/2*(1-t)).cos(), 'poly': t**2, 'log_hidden': torch.log1p(t)/math.log(2), 'bd3_cosine': 1-(1-e)*c}
    for k,h in hidden.items(): assert (survivals[k]().fn(t)[1]-h).abs().max()<1e-14, k
    assert {*want, *hidden}==set(survivals)==set(presets('survival'))
    for s in survivals.values(): # digits near t = 0
        small = torch.tensor([1e-13, 1e-10], dtype=F64)
        a,h = s().fn(small)
        assert (h>0).all() and ((a+h-1).abs()<1e-15).all() and (h[1]>h[0] or late_start(s()))

def test_schedules_by_name():
    for k in survivals: assert Masked(k, 8, 8).schedule.name.startswith(k)
    assert Masked(poly(3.), 8, 8).schedule(.5)[1]==.125 and create('poly', kind='survival', n=3.).name=='poly(3)'
    for bad in (0., -1.):
        with pytest.raises(ValueError, match='power'): poly(bad)
    with pytest.raises(ValueError, match='all are visible at 0'): Masked(geometric(smin=.01), 8, 8)
    with pytest.raises(ValueError, match='none at 1'): Masked(linear_noise(smax=2.), 8, 8)

# --- any schedule ---
@st.composite
def any_survival(draw):
    "Published forms with other numbers, mixtures of two, and a power of time."
    def some():
        f = draw(st.sampled_from([poly, loglinear, geometric, linear_noise, mdlm_cosine]))
        lo,hi = {poly: (1, 5), loglinear: (0, 1e-3), geometric: (1e-6, 9e-4), linear_noise: (7, 20), mdlm_cosine: (0, 1e-3)}[f]
        v = draw(st.floats(lo, hi))
        return f(smax=v) if f is linear_noise else f(v)
    a, b, w, k = some(), some(), draw(st.floats(0, 1)), draw(st.floats(1, 2))
    return Survival('any', lambda t: tuple(w*p+(1-w)*q for p,q in zip(a.fn(t**k), b.fn(t**k))))

@settings(max_examples=25, deadline=None, derandomize=True)
@given(any_survival())
def test_any_schedule(s):
    p = masked(s)
    t = torch.linspace(.05, .95, 19, dtype=F64, requires_grad=True)
    sigma = -s.fn(t)[0].log()
    d, = torch.autograd.grad(sigma.sum(), t)
    assert (d/sigma.expm1()/p.rate(t.detach())-1).abs().max()<1e-9
    ends = torch.linspace(0, 1, 21, dtype=F64)
    r = p.reveal(ends[1:], ends[:-1]) # probabilities, at both ends too
    assert ((r>0) & (r<=1)).all() and r[0]==1
    u = ends[2:-1] # to s and on to r is to go to r at once
    one = (1-p.reveal(ends[3:], u))*(1-p.reveal(u, ends[1:-2]))
    assert (one-(1-p.reveal(ends[3:], ends[1:-2]))).abs().max()<1e-12
    lam = p.hidden_share(ends)
    assert lam[-1]==1 and (lam.diff()>0).all() and lam[0]<=.00101
    got, half = ((P*(p.exact_nelbo(CALL, S, nodes=n)-TRUTH)).sum() for n in (320, 160))
    own = 2*(got-half).abs() # the integral of a steep schedule has an error of its own, as half the nodes show
    assert -2e-5-own<got<2e-5+own+.01*s.fn(torch.zeros(1, dtype=F64))[1]

@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.lists(st.floats(.01, 1), min_size=1, max_size=6))
def test_any_table(parts):
    "For any table: the bound of T steps is no less than what T steps cost, and no less in the mean than the entropy."
    hidden = torch.tensor(parts, dtype=F64).cumsum(0)/sum(parts)
    a = (1-hidden).clamp(min=0)
    a[-1] = 0
    p, T = masked(survival(table('any', a**2))), len(parts)
    bound, real = p.exact_nelbo(CALL, S), -result(p, T)[:3,:3,:3].flatten().log()
    assert (bound>=real-1e-10).all() and (P*bound).sum()>=H-1e-10
    assert (p.quadrature()[1]>0).all() and abs((p.quadrature()[1]*p.hidden_share(p.quadrature()[0])).sum()-1)<1e-12 # L log V

# --- few steps ---
STATES = torch.cartesian_prod(*[torch.arange(4)]*3)
FULL = F.pad(LANG.p, (0, 1)*3)

def result(p, N):
    "Distribution of the samples of N even steps over the 64 states, from `reveal` and `estimate`, without drawing."
    words = p.estimate(CALL, STATES, torch.ones(1)).logits.exp()
    hidden = (STATES==3)[...,None]
    t = torch.linspace(1, 0, N+1, dtype=F64)
    dist = (STATES==3).all(1).double()
    for i in range(N):
        r = p.reveal(t[i], t[i+1])
        q = torch.cat([torch.where(hidden, r, 1.)*words, hidden*(1-r)], -1)
        dist = dist@torch.einsum('xi,xj,xk->xijk', *q.unbind(1)).flatten(1)
    return dist.view(4, 4, 4)

def tv(a, b): return (a-b).abs().sum().item()/2
def histogram(x): return (x@torch.tensor([16, 4, 1])).bincount(minlength=64).view(4, 4, 4).double()/len(x)

def test_total_variation_halves():
    got = [tv(result(TINY, 2**k), FULL) for k in range(8)]
    want = [.2418, .1258, .0644, .0326, .0164, .0082, .0041, .0021]
    assert all(abs(a-b)<6e-5 for a,b in zip(got, want)), got
    assert 1.98<got[-2]/got[-1]<2.02
    once = LANG.conditionals(torch.full((1, 3), 3))[0].exp()
    assert tv(result(TINY, 1)[:3,:3,:3], torch.einsum('i,j,k->ijk', *once))<1e-12

def test_bound_of_few_steps():
    "NELBO_T >= -log p_T, where p_T is what T steps produce; equal for one step; the mean falls to the entropy."
    means = []
    for T in (1, 2, 4, 8):
        bound, real = steps(T).exact_nelbo(CALL, S), -result(TINY, T)[:3,:3,:3].flatten().log()
        assert (bound>=real-1e-12).all()
        if T==1: assert (bound-real).abs().max()<4e-15
        means.append((P*bound).sum().item())
    assert all(abs(a-b)<6e-5 for a,b in zip(means, [3.1600, 3.0704, 3.0192, 2.9920])) and abs(H-2.9637)<6e-5

# --- corrupt ---
@each_schedule
def test_masked_share(s):
    x0 = torch.zeros(4000, 8, dtype=torch.long)
    for i,t in enumerate((0., .1, .5, .9, 1.)):
        x_t,hidden = Masked(s, 8, 8).corrupt(x0, torch.tensor([t]), rng=Rng(7, step=i))
        want = Masked(s, 8, 8).schedule(t)[1].item()
        assert abs(hidden.double().mean()-want)<=4*(want*(1-want)/32_000)**.5+1e-9
        assert ((x_t==8)==hidden).all() and (x_t[~hidden]==0).all()

@pytest.mark.parametrize('how', ['corrupt', 'by_count'])
def test_sets_of_a_size_are_equally_likely(how):
    n, free = 60_000, torch.ones(60_000, 4, dtype=torch.bool)
    if how=='corrupt': hidden = TINY.corrupt(torch.zeros(n, 4, dtype=torch.long), torch.tensor([.5]), rng=Rng(8))[1]
    else: hidden,_,_ = by_count(TINY, torch.full((n,), .3, dtype=F64), free, Rng(8))
    code = (hidden.long()*torch.tensor([8, 4, 2, 1])).sum(1)[hidden.sum(1)==2]
    count = code.bincount(minlength=16)[[3, 5, 6, 9, 10, 12]].double()
    chi = ((count-count.mean())**2/count.mean()).sum()
    assert count.sum()>20_000 and chi<20.5, count # 5 degrees of freedom: 20.5 is exceeded once in a thousand

def test_time_per_position():
    t = torch.tensor([[0., .3, 1.]]).expand(20_000, 3)
    hidden = TINY.corrupt(torch.zeros(20_000, 3, dtype=torch.long), t, rng=Rng(9))[1]
    assert not hidden[:,0].any() and hidden[:,2].all() and abs(hidden[:,1].double().mean()-.3)<.013
    x = torch.full((20_000, 3), 3)
    zeros = Est(x, logits=F.one_hot(torch.zeros_like(x), 3).double().log())
    s = torch.tensor([[0., .5, 1.]]).expand(20_000, 3)
    left = TINY.step(x, zeros, torch.ones(20_000, 3), s, Rng(10))==3
    assert not left[:,0].any() and left[:,2].all() and abs(left[:,1].double().mean()-.5)<.015
    w = TINY.loss(uniform_net(3), torch.zeros(20_000, 3, dtype=torch.long), t.clamp(min=.1), rng=Rng(9)).value.double().mean(0)
    assert ((w-math.log(3)).abs()<.1).all() # each position with the weight of its own time

def test_rows_depend_on_their_index_alone():
    x0, t = cyclic_text(6).x, torch.linspace(.1, .9, 6)
    p, pick = Masked('straight', 8, 8), torch.tensor([4, 1])
    a,b = p.corrupt(x0, t, rng=Rng(11))[0], p.corrupt(x0[pick], t[pick], rng=Rng(11).of(pick))[0]
    assert (a[pick]==b).all()

# --- SUBS ---
@pytest.mark.parametrize('mask_id', [2, 8])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, F64])
def test_subs(mask_id, dtype):
    p = Masked('straight', mask_id, 8)
    x0 = cyclic_text(40).x.clone()
    x0[x0==mask_id] = 0
    x_t,hidden = p.corrupt(x0, torch.tensor([.5]), rng=Rng(12))
    for width in {8, max(8, mask_id+1)}:
        raw = 20*Rng(13).normal(40, 16, width, dtype=dtype)
        raw[...,mask_id:mask_id+1] = 1e4 # the network is sure of the mask
        est = p.estimate(lambda x, net_t: raw, x_t, torch.tensor([.5]))
        assert est.logits.shape==(40, 16, 8) and est.logits.dtype==(F64 if dtype==F64 else torch.float32)
        assert (est.logits.exp().sum(-1)-1).abs().max()<1e-5 and (est.x0!=mask_id).all() and est.x0.dtype==torch.long
        if mask_id<8: assert (est.logits[...,mask_id]==-torch.inf).all()
        assert (est.x0[~hidden]==x0[~hidden]).all() and (est.logits[~hidden].exp()==F.one_hot(x0[~hidden], 8)).all()
        assert (est.x0[hidden]==est.logits[hidden].argmax(-1)).all()
        others = [v for v in range(8) if v!=mask_id]
        assert torch.allclose(est.logits[hidden][:,others], raw[hidden][:,others].to(est.logits.dtype).log_softmax(-1))

# --- the head, late ---
class Net(Denoiser):
    "Looks at all tokens, at the time of each sample (or of each position) and at a label."
    def __init__(self, c=lambda net_t, x: net_t[:,None].expand(len(x), 4)):
        super().__init__()
        self.emb, self.out, self.c = torch.nn.Embedding(9, 4, dtype=F64), torch.nn.Linear(4, 9, dtype=F64), c
        for i,o in enumerate(self.parameters()): o.data = Rng(i).normal(*o.shape, dtype=F64)
        self.texts, self.rows = 0, []
    def features(self, x, net_t, y=None, deep=None, **cond):
        self.texts += len(x)
        h = self.emb(x)
        if y is not None: h = h+y[:,None,None]+deep['k'][0][:,None]
        return Feats(h+(h.cumsum(1)+h.sum(1, keepdim=True)).tanh(), self.c(net_t, x))
    def head(self, feats):
        self.rows.append(feats.h.shape[:2].numel())
        c = feats.c if feats.c is None or feats.c.ndim==3 else feats.c[:,None]
        return self.out(feats.h if c is None else feats.h*(1+c))

@pytest.mark.parametrize('c', [lambda t, x: t[:,None].expand(len(x), 4), lambda t, x: t[:1,None].expand(1, 4), lambda t, x: None,
    lambda t, x: x[...,None].double().expand(-1, -1, 4), lambda t, x: torch.arange(20.)[None,:,None].double().expand(1, 20, 4)],
    ids=['per sample', 'shared', 'none', 'per position', 'positions, shared'])
def test_late_rows(c):
    net, x, t = Net(c), Rng(40).integers(9, 8, 20), Rng(41).uniform(8, 1)[:,0]
    if c(t, x) is not None and c(t, x).shape==(1, 4): t = t[:1] # one time for all
    cond = dict(y=Rng(42).uniform(8, 1)[:,0], deep=dict(k=[Rng(43).normal(8, 4, dtype=F64)]))
    full = net(x, t, **cond)
    for share in (.02, .3, 1.):
        where = Rng(44).uniform(8, 20)<share
        net.texts, net.rows = 0, []
        parts = list(rows(late_head(net)(x, t, **cond), where))
        assert (torch.cat(parts)-full[where]).abs().max()<1e-12
        assert net.texts==where.any(1).sum() and net.rows==[len(o) for o in parts] and max(net.rows)<=128 and sum(net.rows)==where.sum()
    assert list(rows(late_head(net)(x, t, **cond), where & False))==[] and next(rows(full, where & False)).shape==(0, 9)

def test_late_is_a_tensor_elsewhere():
    net, x, t = Net(), Rng(40).integers(9, 8, 20), Rng(41).uniform(8, 1)[:,0]
    full, o, where = net(x, t), late_head(net)(x, t), Rng(44).uniform(8, 20)<.3
    net.rows = []
    for f in (lambda a: torch.lerp(a, 2*a, .3), lambda a: a+a*3, lambda a: a-2.*a, lambda a: torch.add(a, 1.)):
        before = len(net.rows)
        assert type(f(o)) is Late and len(net.rows)==before # nothing has run
        assert (torch.cat(list(rows(f(o), where)))-f(full)[where]).abs().max()<1e-12
    for f in (lambda a: a.std(), lambda a: a[...,:2], lambda a: torch.cat([a, a]), lambda a: a+full, lambda a: a.shape[2], lambda a: torch.softmax(a, -1)):
        assert torch.as_tensor(f(o)==f(full)).all() or (f(o)-f(full)).abs().max()<1e-12

def test_networks_that_are_left_alone():
    class Own(Net):
        def forward(self, x, net_t, **cond): return super().forward(x, net_t, **cond)+1
    hooked, compiled = Net(), Net()
    hooked.register_forward_pre_hook(lambda *o: None)
    compiled._compiled_call_impl = lambda *o, **k: None
    for net in (Own(), hooked, compiled, torch.nn.Linear(2, 2), torch.sin): assert late_head(net) is net
    net = late_head(Net())
    assert net.null(1, y=2)==(1, dict(y=None)) and net.prepare(y=2)==dict(y=2) and net.time_free is False

def test_estimate_and_loss_with_a_late_head():
    p, net, x0 = Masked('straight', 8, 8), Net(), cyclic_text(6).x
    t = torch.linspace(.1, .9, 6, dtype=F64)
    x_t,hidden = p.corrupt(x0, t, rng=Rng(45))
    a,b = (p.estimate(o, x_t, t) for o in (net, p.late(net)))
    assert (a.x0==b.x0).all() and (a.logits.exp()-b.logits.exp()).abs().max()<1e-12
    net.rows = []
    one,two = (p.loss(o, x0, t, rng=Rng(45)).value for o in (net, p.late(net)))
    assert torch.allclose(one, two, atol=1e-6) and sum(net.rows[1:])==hidden.sum()
    ga,gb = (torch.autograd.grad(p.loss(o, x0, t, rng=Rng(45)).value.sum(), net.emb.weight)[0] for o in (net, p.late(net)))
    assert (ga-gb).abs().max()<1e-6*ga.abs().max() and ga.abs().max()>0

# --- weights and means ---
def test_near_context():
    w = near_context(.3)(None, None, torch.tensor([[False, True, True, False, True]]))
    assert (w[0]-torch.tensor([0, .255, .255, 0, .20145], dtype=F64)).abs().max()<1e-12
    p, x0, t = Masked('straight', 8, 8, near_context()), cyclic_text(20).x, torch.full((20,), .5, dtype=F64)
    loss, hidden = p.loss(uniform_net(8), x0, t, rng=Rng(46)), p.corrupt(x0, t, rng=Rng(46))[1]
    assert torch.allclose(loss.value, (near_context()(p, t, hidden)*math.log(8)).float()) and (loss.value[~hidden]==0).all()
    for bad in (0., 1.):
        with pytest.raises(ValueError): near_context(bad)

def test_score_entropy():
    "Least at r p, where its mean is r H(p): with sigma' in front, the weighted cross-entropy."
    sigma = torch.tensor([.7], dtype=F64)
    r, q = 1/sigma.expm1(), Rng(47).uniform(1, 5)[0]
    q = q/q.sum()
    s = (r*q).log().requires_grad_()
    mean = (q*score_entropy(s.expand(5, 5), torch.arange(5), sigma)).sum()
    g, = torch.autograd.grad(mean, s)
    assert abs(mean-r*-(q*q.log()).sum())<1e-14 and g.abs().max()<1e-15
    sure = score_entropy(r.log().expand(1, 1), torch.zeros(1, dtype=torch.long), sigma)
    assert abs(sure)<1e-15 # a point mass costs nothing
    for k in range(5):
        assert (q*score_entropy((s+.3*F.one_hot(torch.tensor(k), 5)).expand(5, 5), torch.arange(5), sigma)).sum()>mean
    p = masked('geometric') # sigma'(t) r H(p) = w(t) H(p)
    t = torch.tensor([.6], dtype=F64, requires_grad=True)
    sig = -p.schedule.fn(t)[0].log()
    d, = torch.autograd.grad(sig.sum(), t)
    s = (q/sig.detach().expm1()).log()
    mean = d*(q*score_entropy(s.expand(5, 5), torch.arange(5), sig.detach())).sum()
    assert abs(mean-p.rate(t.detach())*-(q*q.log()).sum())<1e-10

def test_means():
    value, mask = Rng(48).uniform(5, 7), Rng(49).uniform(5, 7)<.5
    mask[3] = False # a text of which nothing counts
    loss = Loss(value.float(), mask)
    rows_ = [value[i][mask[i]] for i in range(5)]
    assert abs(mean_of_texts(loss)-sum(o.mean() for o in rows_ if len(o))/4)<1e-6
    assert abs(nats_per_text(loss)-sum(o.sum() for o in rows_)/5)<1e-6
    assert abs(mean_loss(loss)-torch.cat(rows_).mean())<1e-6
    whole = Loss(value.float())
    assert abs(mean_of_texts(whole)-value.mean())<1e-6 and abs(nats_per_text(whole)-value.sum()/5)<1e-5
    nothing = Loss(value.float(), mask & False)
    assert mean_of_texts(nothing)==nats_per_text(nothing)==0
    bad = Loss(torch.where(mask, value, torch.nan).float(), mask) # what does not count may be anything
    assert mean_of_texts(bad).isfinite() and nats_per_text(bad).isfinite()

# --- blocks ---
def attend(x, seen):
    "One layer of attention over tokens, as a function of who looks at whom: `(n,v)` logits."
    w = [Rng(50+i).normal(9, 6, dtype=F64) for i in range(3)]
    q,k,v = (o[x] for o in w)
    return (q@k.T).masked_fill(~seen, -torch.inf).softmax(-1)@v

@pytest.mark.parametrize('n,B', [(8, 2), (12, 4), (6, 1), (6, 6)])
def test_block_mask(n, B):
    seen, blocks = block_mask(n, B), n//B
    assert seen.sum()==B*B*(blocks+blocks**2) and seen.shape==(2*n, 2*n)
    noisy, clean = Rng(53).integers(9, 1, n)[0], Rng(54).integers(9, 1, n)[0]
    def run(a, b): # two layers: the second sees what the first gathered
        h = attend(torch.cat([a, b]), seen)
        return (h@h.T).masked_fill(~seen, -torch.inf).softmax(-1)@h
    base = run(noisy, clean)
    for j in range(blocks):
        at = slice(j*B, (j+1)*B)
        other = clean.clone()
        other[at] = (other[at]+1)%9
        new = run(noisy, other)
        assert (new[:(j+1)*B]==base[:(j+1)*B]).all() # noisy blocks up to j
        if j+1<blocks: assert (new[(j+1)*B:n]!=base[(j+1)*B:n]).any(1).all()
        assert (new[n:n+j*B]==base[n:n+j*B]).all() # clean blocks before j
        other = noisy.clone()
        other[at] = (other[at]+1)%9
        changed = (run(other, clean)!=base).any(1)
        assert changed[at].all() and not changed[:j*B].any() and not changed[(j+1)*B:].any() # itself alone
    if B==n: assert (run(noisy, clean)[:n]==run(noisy, (clean+1)%9)[:n]).all()
    for bad in (0, 5):
        with pytest.raises(ValueError, match='do not fit'): block_mask(n, bad)

# --- tails ---
M, N_DRAWS = 65_536, 1_000_000
TAIL = torch.cat([torch.tensor([.999], dtype=F64), torch.full((M,), 1e-3/M, dtype=F64)]).log()

def race(u, v, grid):
    "Share that the M rare tokens win in a race of arrival times -log(u)/p, u on a grid; v**(1/M) is the largest of M."
    head, best = (u/grid).floor()*grid, (v**(1/M)/grid).floor()*grid
    return (best.log()/(1e-3/M)>head.log()/.999).double().mean().item()

def test_tail():
    u,v = Rng(26).uniform(2, N_DRAWS)
    def ok(share): return abs(share-1e-3)<1e-4
    assert ok((draw(TAIL, u)>0).double().mean().item())
    assert ok(race(u, v, 2.**-53)) and not ok(race(u, v, 2.**-24)) # float32 loses them

def test_every_rare_token_can_be_drawn():
    "Each owns an interval of width 1.5e-8 in the uniform number: narrower than the steps of float32."
    mid = .999+(torch.arange(M, dtype=F64)+.5)*1e-3/M
    assert (draw(TAIL, mid)==torch.arange(1, M+1)).all()

@pytest.mark.parametrize('dtype', [torch.float32, F64, torch.bfloat16])
def test_two_stages(dtype):
    "Long rows are drawn as short ones are, and from every group, the last and shorter one too."
    v = 5*256+77
    logits = (3*Rng(38).normal(400, v, dtype=F64)).to(dtype)
    u = Rng(39).uniform(400, 1)
    one = invert((logits.to(torch.promote_types(dtype, torch.float32))-logits.amax(-1, keepdim=True)).exp(), u)[0]
    same = (draw(logits, u)==one).double().mean()
    assert same==1 if dtype==F64 else same>.99 # float32 sums of groups may move a border by 1e-7
    flat = torch.zeros(v, 1).T.expand(v, v) # all equal: token i owns [i/v, (i+1)/v)
    mid = (torch.arange(v, dtype=F64)[:,None]+.5)/v
    assert (draw(flat.to(dtype), mid)[:,0]==torch.arange(v)).all()
    tail = torch.full((1, v), -30., dtype=F64)
    tail[0,0] = 0.
    share = math.exp(-30.)/(1+(v-1)*math.exp(-30.)) # of each: 1e-13
    at = 1-share*(torch.tensor([v-1, 700, 1], dtype=F64)-.5)
    assert draw(tail.expand(3, v), at[:,None])[:,0].tolist()==[1, v-700, v-1]

def test_narrow():
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
    logits = 3*Rng(62).normal(50, 40, dtype=F64)
    for T,k,p in ((1., None, 1.), (.7, None, 1.), (1., 5, 1.), (1., None, .8), (1.3, 10, .6), (1., 1, 1.), (1., None, 1e-9), (1., 100, .999)):
        want = logits
        if T!=1: want = TemperatureLogitsWarper(T)(None, want)
        if k: want = TopKLogitsWarper(k)(None, want)
        if p<1: want = TopPLogitsWarper(p)(None, want)
        assert torch.equal(narrow(T, k, p)(logits), want), (T, k, p)
    assert narrow()(logits) is logits
    cold = narrow(0.)(torch.tensor([[1., 3., 3., 2.]]))
    assert cold.softmax(-1).tolist()==[[0, .5, .5, 0]]
    holes = logits.masked_fill(Rng(63).uniform(50, 40)<.5, -torch.inf) # the mask is impossible, and stays so
    for f in (narrow(.5), narrow(k=3), narrow(p=.9), narrow(0.)): assert (f(holes)[holes==-torch.inf]==-torch.inf).all() and f(holes).isfinite().any(1).all()
    for bad in (dict(temperature=-.1), dict(k=0), dict(p=0.), dict(p=1.1)):
        with pytest.raises(ValueError): narrow(**bad)

def test_fill_draws_in_float64():
    class Fixed(Rng):
        def at(self, stream=None, step=None): return self
        def uniform(self, *shape, **kw): return .999+(torch.arange(math.prod(shape), dtype=F64).view(shape)+.5)*1e-3/M
    p = Masked('straight', M+1, M+1)
    est = Est(torch.zeros(2, 4, dtype=torch.long), logits=TAIL.expand(2, 4, M+1))
    got = p.fill(torch.full((2, 4), M+1), est, torch.ones(2, 4, dtype=torch.bool), Fixed())
    assert got.flatten().tolist()==list(range(1, 9))

def test_impossible_tokens_are_never_drawn():
    logits = torch.tensor([-torch.inf, 0., -torch.inf, -745., -torch.inf])
    ends = torch.tensor([2.**-54, .5, 1-2.**-53], dtype=F64)
    assert set(draw(logits, ends).tolist()) <= {1, 3}
    assert draw(torch.zeros(4), torch.tensor([.25, .5, .75, .7499999], dtype=F64)).tolist()==[1, 2, 3, 2] # sum exceeds u
    assert set(draw(torch.tensor([-torch.inf, 1., 1., -torch.inf]), Rng(27).uniform(1, 10_000)[0]).tolist())=={1, 2}

def test_draw_stays_inside():
    "Rounded probabilities may add up to less than the largest uniform number."
    logits, u = Rng(37).normal(50, 33, dtype=F64), torch.full((50, 1), 1-2.**-53, dtype=F64)
    assert (logits.softmax(-1).cumsum(-1)[:,-1:]<=u).any() # the case at hand
    assert (draw(logits, u)<33).all()

# --- loss ---
def net_of(w): # looks at every real token
    return lambda x, net_t: (w[x].cumsum(1)+w[x].sum(1, keepdim=True))[...,:8]

def test_pads_change_nothing():
    w, p = Rng(28).normal(9, 8, dtype=F64).requires_grad_(), Masked('straight', 8, 8)
    x0, t = cyclic_text(6).x, torch.linspace(.2, .9, 6)
    keep = (torch.arange(16)<3).expand(6, 16)
    a = p.loss(net_of(w), x0, t, keep=keep, rng=Rng(29))
    ga, = torch.autograd.grad(mean_loss(a), w)
    for pad in (0, 5):
        padded = F.pad(x0, (0, 4), value=pad)
        real = lambda x, net_t: F.pad(net_of(w)(x[:,:16], net_t), (0, 0, 0, 4)) # attends to real tokens alone
        b = p.loss(real, padded, t, keep=F.pad(keep, (0, 4)), mask=F.pad(torch.ones(6, 16, dtype=torch.bool), (0, 4)), rng=Rng(29))
        gb, = torch.autograd.grad(mean_loss(b), w)
        assert (a.value==b.value[:,:16]).all() and (b.value[:,16:]==0).all() and not b.mask[:,16:].any()
        assert abs(mean_loss(a)/mean_loss(b)-1)<1e-6 and (ga-gb).abs().max()<1e-6*ga.abs().max()
        real_x = lambda x, net_t: (x[:,16:]==pad).all() and real(x, net_t) # pads are never hidden
        for f in (by_count, by_time):
            one = p.nelbo(net_of(w), x0, 8, f, keep=keep, rng=Rng(30))
            two = p.nelbo(real_x, padded, 8, f, keep=F.pad(keep, (0, 4)), mask=b.mask | F.pad(keep, (0, 4)), rng=Rng(30))
            assert (one-two).abs().max()<1e-6

def test_prompt_is_never_hidden_nor_counted():
    p, x0 = Masked('straight', 8, 8), cyclic_text(50).x
    keep = Rng(31).uniform(50, 16)<.4
    def net(x, net_t):
        assert (x[keep]==x0[keep]).all()
        return raw
    raw = Rng(32).normal(50, 16, 8).requires_grad_()
    for t in (.3, 1.):
        loss = p.loss(net, x0, torch.tensor([t]), keep=keep, rng=Rng(33))
        assert (loss.value[keep]==0).all() and (loss.mask==~keep).all()
        g, = torch.autograd.grad(mean_loss(loss), raw)
        assert (g[keep]==0).all() and (g[~keep]!=0).any()
    other = torch.where(keep, (x0+1)%8, x0) # targets at the prompt do not matter
    a,b = (p.loss(lambda x, net_t: raw, o, torch.tensor([.5]), keep=keep, rng=Rng(33)).value for o in (x0, other))
    assert (a==b).all()

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_loss_is_finite(dtype):
    p, x0 = Masked('cosine', 2, 8), torch.ones(4, 6, dtype=torch.long)
    raw = (100*Rng(34).normal(4, 6, 8)).to(dtype).requires_grad_()
    for t in (0., 1e-12, .5, 1.):
        loss = p.loss(lambda x, net_t: raw, x0, torch.tensor([t]), rng=Rng(35))
        g, = torch.autograd.grad(mean_loss(loss), raw)
        assert loss.value.dtype==torch.float32 and loss.value.isfinite().all() and g.isfinite().all()
        if t<1e-6: assert (loss.value==0).all() and (g==0).all()

def test_a_network_learns_marginals():
    "The gradient of the loss, in the mean, points to the truth: a table of logits for a single word learns its distribution."
    p, q = Masked('straight', 3, 3), torch.tensor([.6, .3, .1])
    x0 = torch.tensor([0]*6+[1]*3+[2])[:,None].repeat(20, 1)
    w = torch.zeros(3, requires_grad=True)
    opt = torch.optim.Adam([w], .1)
    for i in range(80):
        loss = mean_loss(p.loss(lambda x, net_t: w.expand(*x.shape, 3), x0, (torch.arange(200)+.5)/200, rng=Rng(36, step=i)))
        opt.zero_grad(); loss.backward(); opt.step()
        for g in opt.param_groups: g['lr'] = .1*(1-i/80)
    assert (w.softmax(-1)-q).abs().max()<.06

# --- errors ---
def test_errors():
    x, t = cyclic_text(2).x, torch.ones(1)
    p = Masked('straight', 8, 8)
    def never(x, net_t): pytest.fail('bad tokens reached the network')
    with pytest.raises(TypeError): p.corrupt(x.float(), t)
    for bad,say in ((9, 'holds 9: ids are 0...7'), (-1, 'holds -1'), (8, 'holds the mask, id 8')):
        y = x.clone()
        y[1,3] = bad
        for f in (lambda: p.corrupt(y, t), lambda: p.loss(never, y, t), lambda: p.nelbo(never, y),
                  lambda: p.exact_nelbo(never, y[:,:4])):
            with pytest.raises(ValueError, match=f'sample 1, position 3 {say}'): f()
    with pytest.raises(ValueError, match='sample 0, position 5 holds the mask, id 2: clean data have none'):
        Masked('straight', 2, 8).corrupt(torch.tensor([[0, 1, 3, 4, 5, 2]]), t)
    for shape in ((2, 16, 7), (2, 16, 10)):
        with pytest.raises(ValueError, match='it must give 8 or 9'): p.loss(lambda x, net_t: torch.zeros(shape), x, t)
    for shape in ((2, 15, 8), (2, 16)):
        with pytest.raises(ValueError, match='one row a token'): p.loss(lambda x, net_t: torch.zeros(shape), x, t)
    with pytest.raises(ValueError, match='2\\^16 sets'): p.exact_nelbo(never, x)
    with pytest.raises(ValueError, match='mask_id is 9'): Masked('straight', 9, 8)
    with pytest.raises(ValueError, match='survival'): Masked(cosine(), 8, 8)
    with pytest.raises(ValueError, match='none at 1'): Masked('scaled_linear', 8, 8)
    with pytest.raises(ValueError, match='did you mean'): Masked('strait', 8, 8)
    Masked('loglinear', 8, 8) # a thousandth left, as MDLM has it
