"""Masked diffusion on languages small enough to enumerate, with exact conditionals as the network.

Where something is drawn, keys are fixed and bounds are at least three standard deviations (3.5 or more where there are many comparisons).
"""
import itertools, math
import pytest, torch
import torch.nn.functional as F
from diffnb.core import Est, mean_loss, presets
from diffnb.data.toy import cyclic_text, tiny_language
from diffnb.grids import uniform
from diffnb.process.masked import Masked, by_count, by_time, draw
from diffnb.rng import Rng
from diffnb.samplers import ancestral as plain, sample
from diffnb.samplers.masked import ancestral, confident, margin, neg_entropy, quota, random_rank, top_prob
from diffnb.schedules import Schedule, cosine, survival, table

F64 = torch.float64
def alpha(name, f): return survival(Schedule(name, lambda t: (f(t), 1-f(t))))
SCHEDULES = {'straight': survival('straight'), 'cosine': survival(cosine(s=0.)), 'cosine s=.008': survival('cosine'),
             'md4': alpha('md4', lambda t: 1-(math.pi/2*(1-t)).cos()), 'poly2': alpha('poly2', lambda t: 1-t**2),
             'cosine squared': alpha('cosine squared', lambda t: (math.pi/2*t).cos()**2)}
each_schedule = pytest.mark.parametrize('s', SCHEDULES.values(), ids=SCHEDULES)

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
    assert (masked(s).exact_nelbo(CALL, S)-TRUTH).abs().max()<1e-10

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
    for s in ('cosine',):
        for f in (by_time, by_count):
            got = masked(s).nelbo(CALL, x0, 16, f, rng=Rng(2)).view(80, 27)
            z = (got.mean(0)-TRUTH)/got.std(0)*80**.5
            assert z.abs().max()<4.5, (s, f)

@each_schedule
def test_uniform_model(s):
    x0 = cyclic_text(6, length=5).x
    p = Masked(s, 8, 8)
    assert (p.exact_nelbo(uniform_net(8), x0)-5*math.log(8)).abs().max()<1e-10
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
    sigma = -s(t)[0].log()
    d, = torch.autograd.grad(sigma.sum(), t)
    w = masked(s).rate(t.detach())
    assert ((d/sigma.expm1()-w)/w).abs().max()<1e-10
    a = s(torch.linspace(0, 1, 1001, dtype=F64))[0]
    assert (a.diff()<0).all() and abs(a[0]-1)<1e-12 and 0<=a[-1]<1e-12

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

@pytest.mark.parametrize('step', [plain(), ancestral()], ids=['plain', 'lazy'])
@pytest.mark.parametrize('N', [1, 4])
def test_samples_have_that_distribution(step, N):
    n = 30_000
    want = result(TINY, N)
    got = histogram(last(CALL, TINY, (n, 3), steps=N, step=step, rng=Rng(5)))
    assert ((got-want).abs()<4.2*(want*(1-want)/n).sqrt()+1e-9).all()
    assert tv(got, want)<.02<tv(got, FULL) # it can tell 4 steps from infinitely many

@pytest.mark.parametrize('rank', [random_rank, margin, neg_entropy])
def test_one_at_a_time_is_exact(rank):
    n = 30_000
    got = histogram(last(CALL, TINY, (n, 3), steps=3, step=confident(rank), rng=Rng(6)))
    assert ((got-FULL).abs()<4.2*(FULL*(1-FULL)/n).sqrt()+1e-9).all()

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
        want = s(t)[1].item()
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
    for f in (ancestral(), confident(), confident(random_rank)):
        all_, some = (last(uniform_net(8), p, (len(r.idx), 16), steps=5, step=f, rng=r) for r in (Rng(11).of(range(6)), Rng(11).of(pick)))
        assert (all_[pick]==some).all()

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
        assert (est.logits.exp().sum(-1)-1).abs().max()<1e-5 and (est.x0!=mask_id).all()
        if mask_id<8: assert (est.logits[...,mask_id]==-torch.inf).all()
        assert (est.x0[~hidden]==x0[~hidden]).all() and (est.logits[~hidden].exp()==F.one_hot(x0[~hidden], 8)).all()
        assert (est.x0[hidden]==est.logits[hidden].argmax(-1)).all()
        others = [v for v in range(8) if v!=mask_id]
        assert torch.allclose(est.logits[hidden][:,others], raw[hidden][:,others].to(est.logits.dtype).log_softmax(-1))

@pytest.mark.parametrize('name', presets('masked_sampler'))
@pytest.mark.parametrize('N', [1, 2, 3, 7, 50])
def test_sampling(name, N):
    "Visible tokens never change, no mask is left, the prompt is what it was; tokens never include the mask's id."
    p = Masked('cosine', 2, 8) # the mask is one of the ids
    known = torch.where(Rng(14).uniform(5, 16)<.3, 5, 2)
    step = presets('masked_sampler')[name]()
    xs = [known, *sample(uniform_net(8), p, (5, 16), steps=N, step=step, known=known, keep=known==5, rng=Rng(15))]
    assert len(xs)==N+1 and xs[-1].dtype==torch.long
    for a,b in zip(xs, xs[1:]): assert (b[a!=2]==a[a!=2]).all()
    assert (xs[-1]!=2).all() and (xs[-1][known==5]==5).all()

def test_guidance_off_is_conditional():
    def net(x, net_t, y=None, **cond): return Rng(16, step=int((x==8).sum())).normal(*x.shape, 8)+y[:,None,None]*torch.arange(8.)
    p, known = Masked('straight', 8, 8), cyclic_text(3).x
    keep = (torch.arange(16)<5).expand(3, 16)
    kw = dict(steps=6, step=ancestral(), cond=dict(y=torch.tensor([1., 0., -1.])), known=known, keep=keep)
    a,b,c = (last(net, p, (3, 16), **kw, uncond=u, w=w) for u,w in ((None, 1.), (dict(y=torch.zeros(3)), 1.), (dict(y=torch.zeros(3)), 3.)))
    assert (a==b).all() and (a!=c).any()
    for x in (a, c): assert (x[keep]==known[keep]).all()

# --- calls ---
class Counter:
    "A network that looks at all tokens, and counts its calls."
    def __init__(self, w=None): self.n, self.w = 0, w if w is not None else Rng(17).normal(9, 8)
    def __call__(self, x, net_t, **cond):
        self.n += 1
        return self.w[x].mean(1, keepdim=True)*5+torch.zeros(*x.shape, 8)

@pytest.mark.parametrize('N', [8, 60])
def test_lazy_is_plain(N):
    a,b,p = Counter(), Counter(), Masked('cosine', 8, 8)
    x,y = (last(net, p, (2, 16), steps=N, step=f, rng=Rng(18)) for net,f in ((a, ancestral()), (b, plain())))
    assert (x==y).all() and b.n==N and (a.n<N if N==60 else a.n<=N)

@pytest.mark.parametrize('N,L', [(32, 128), (128, 128), (100, 20)])
def test_number_of_calls(N, L):
    used, R = [], 5
    for r in range(R):
        net = Counter()
        last(net, Masked('straight', 8, 8), (1, L), steps=N, step=ancestral(), rng=Rng(r))
        used.append(net.n)
    used = torch.tensor(used).double()
    q = 1-1/N
    var = N*q**L*(1-q**L)+N*(N-1)*((1-2/N)**L-q**(2*L)) # of the number of occupied boxes: L balls in N boxes
    want = N*(1-q**L)
    assert abs(used.mean()-want)<3*(var/R)**.5 and ((used-want).abs()<3.5*var**.5+1).all(), (used, want)

# --- confidence ---
def test_quota():
    def split(m, N):
        out = []
        for left in range(N, 0, -1):
            out.append(int(quota(torch.tensor([m]), left)))
            m -= out[-1]
        return out
    assert split(10, 4)==[3, 3, 2, 2]
    for m in range(20):
        for N in range(1, 12): assert split(m, N)==[m//N+(i<m%N) for i in range(N)]

@pytest.mark.parametrize('rank', [top_prob, margin, neg_entropy, random_rank])
def test_highest_rank_first(rank):
    p, seen = Masked('straight', 8, 8), {}
    x0 = cyclic_text(40).x
    x = p.corrupt(x0, torch.linspace(0, 1, 40), rng=Rng(19))[0]
    raw = 3*Rng(20).normal(40, 16, 8, dtype=F64)
    def spy(logp, tokens, rng):
        seen.update(score=rank(logp, tokens, rng), tokens=tokens)
        return seen['score']
    for i in range(4):
        x_s = confident(spy)(p, lambda x, net_t: raw, x, uniform()(p, 4), i, {}, Rng(21))
        for j in range(40):
            hidden = [k for k in range(16) if x[j,k]==8]
            best = sorted(sorted(hidden, key=lambda k: -seen['score'][j,k])[:-(-len(hidden)//(4-i))])
            assert [k for k in range(16) if x_s[j,k]!=x[j,k]]==best
            assert (x_s[j,best]==seen['tokens'][j,best]).all()

def test_ranks():
    q = torch.softmax(2*Rng(22).normal(3, 5, 6, dtype=F64), -1)
    tokens = Rng(23).integers(6, 3, 5)
    got = {f: f(q.log(), tokens, Rng(24)) for f in (top_prob, margin, neg_entropy, random_rank)}
    for i,j in itertools.product(range(3), range(5)):
        o, big = q[i,j], sorted(q[i,j].tolist())
        assert abs(got[top_prob][i,j].exp()-o[tokens[i,j]])<1e-12
        assert abs(got[margin][i,j]-(big[-1]-big[-2]))<1e-12
        assert abs(got[neg_entropy][i,j]-(o*o.log()).sum())<1e-12
    assert neg_entropy(torch.tensor([[[0., -torch.inf]]]), tokens[:1,:1], Rng(0))==0 # 0 log 0
    assert got[random_rank].unique().numel()==15

def test_a_rank_of_infinities_leaves_no_mask():
    p = Masked('straight', 8, 8)
    known = torch.where(torch.arange(16)<4, 1, 8).expand(2, 16)
    step = confident(lambda logp, x, rng: torch.full(x.shape, -torch.inf))
    x0 = last(uniform_net(8), p, (2, 16), steps=3, step=step, known=known, keep=known<8)
    assert (x0<8).all()

def test_temperature():
    raw = Rng(25).normal(1, 1, 8).expand(500, 16, 8)
    p, net = Masked('straight', 8, 8), lambda x, net_t, **cond: raw
    for f in (ancestral, confident):
        assert (last(net, p, (500, 16), steps=4, step=f(0.) if f is ancestral else f(temperature=0.))==raw.argmax(-1)).all()
    for T in (.5, 1., 2.):
        share = last(net, p, (500, 16), steps=1, step=ancestral(T)).flatten().bincount(minlength=8)/8000
        want = (raw[0,0]/T).softmax(-1)
        assert ((share-want).abs()<4.2*(want*(1-want)/8000).sqrt()).all()
    with pytest.raises(ValueError, match='at least 0'): last(net, p, (500, 16), steps=1, step=ancestral(-1.))

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
    for shape in ((2, 16, 7), (2, 16, 10), (2, 15, 8), (2, 16)):
        with pytest.raises(ValueError, match='8 or 9 columns'): p.loss(lambda x, net_t: torch.zeros(shape), x, t)
    with pytest.raises(ValueError, match='2\\^16 sets'): p.exact_nelbo(never, x)
    with pytest.raises(ValueError, match='mask_id is 9'): Masked('straight', 9, 8)
    with pytest.raises(ValueError, match='survival'): Masked(cosine(), 8, 8)
    with pytest.raises(ValueError, match='none at 1'): Masked('scaled_linear', 8, 8)
    with pytest.raises(ValueError, match='did you mean'): Masked('strait', 8, 8)
    Masked(alpha('mdlm', lambda t: 1-(1-1e-3)*t), 8, 8) # a thousandth left, as MDLM has it
