"""How text is uncovered: in law on a language small enough to enumerate, token by token against plain loops, and in calls of the network.

Where something is drawn, keys are fixed and bounds are at least three standard deviations (3.5 or more where there are many comparisons).
"""
import math
import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from diffnb.core import Denoiser, Feats, presets
from diffnb.data.toy import cyclic_text, tiny_language
from diffnb.grids import Grid, uniform
from diffnb.guidance import constant, interval
from diffnb.process.masked import Masked
from diffnb.rng import Rng
from diffnb.samplers import ancestral as plain, sample
from diffnb.samplers.masked import (ancestral, blocks, capped, confident, entropy_bound, even, first_hitting, highest, loop, margin, neg_entropy,
    place, plateau, random_rank, remask, scaled, scheduled, threshold, top_prob, unsure)
from diffnb.tokens import narrow

F64 = torch.float64
LANG = tiny_language()
TINY = Masked('straight', 3, 3)
CALL = TINY.oracle(LANG.conditionals)
STATES = torch.cartesian_prod(*[torch.arange(4)]*3)
FULL = F.pad(LANG.p, (0, 1)*3)
KINDS = ('masked_sampler', 'remasking_sampler')
EVERY = {n: f for k in KINDS for n,f in presets(k).items() if f.__wrapped__.__module__=='diffnb.samplers.masked'}
OTHERS = {'narrow': lambda: ancestral(narrow(.8, 5, .9)), 'random_rank': lambda: confident(random_rank), 'margin': lambda: confident(margin),
          'scheduled': lambda: confident(neg_entropy, share=scheduled), 'alg_temp': lambda: confident(alg_temp=.3), 'bold': lambda: entropy_bound(3.),
          'blocks of 5': lambda: blocks(ancestral(), 5, 2), 'blocks, hitting': lambda: blocks(first_hitting(), 7), 'unsure': lambda: remask(unsure()),
          'all that is allowed': lambda: remask(scaled(1.)), 'blocks that think again': lambda: blocks(remask(scaled(.5)), 6)}
each = pytest.mark.parametrize('name', [*EVERY, *OTHERS])
def make(name): return {**EVERY, **OTHERS}[name]()
def again(name): return name in ('remask', 'loop', 'unsure', 'all that is allowed', 'blocks that think again') # hides tokens again

def last(*args, **kw): return list(sample(*args, **kw))[-1]
def uniform_net(v): return lambda x, net_t, **cond: torch.zeros(*x.shape, v, dtype=F64)
def tv(a, b): return (a-b).abs().sum().item()/2
def histogram(x): return (x@torch.tensor([16, 4, 1])).bincount(minlength=64).view(4, 4, 4).double()/len(x)
def close(got, want, n, k=4.2): return ((got-want).abs()<k*(want*(1-want)/n).sqrt()+1e-9).all()

class Net(Denoiser):
    "Looks at all tokens that exist, at the time and at a label; its null hides the prompt and the label."
    def __init__(self, vocab=8, mask_id=8, width=9):
        super().__init__()
        self.mask_id = mask_id
        self.emb, self.out = (torch.nn.Embedding(9, 6, dtype=F64), torch.nn.Linear(6, width, dtype=F64))
        for i,o in enumerate(self.parameters()): o.data = 2*Rng(i).normal(*o.shape, dtype=F64)
        self.texts, self.rows, self.calls = 0, 0, 0
    def features(self, x, net_t, y=None, mask=None, **cond):
        self.texts, self.calls = self.texts+len(x), self.calls+1
        h = self.emb(x)+(0 if y is None else y[:,None,None])+torch.linspace(-1, 1, x.shape[1], dtype=F64)[:,None]
        seen = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
        w = (h@h.transpose(1, 2)).masked_fill(~seen[:,None], -torch.inf).softmax(-1)
        return Feats((h+w@h).tanh(), net_t.to(h)[:,None].expand(len(x), 6) if net_t.ndim else None)
    def head(self, feats):
        self.rows += feats.h.shape[:2].numel()
        return self.out(feats.h*(1+feats.c[:,None]))
    def null(self, x, keep=None, **cond):
        return (x if keep is None else torch.where(keep, self.mask_id, x)), {**cond, 'y': None}
P8 = Masked('cosine', 8, 8)

# --- what must hold for all ---
@each
@pytest.mark.parametrize('N', [1, 2, 3, 7, 50])
def test_sampling(name, N):
    "Visible tokens never change, no mask is left, the prompt is what it was; tokens never include the mask's id."
    p = Masked('cosine', 2, 8) # the mask is one of the ids
    known = torch.where(Rng(14).uniform(5, 16)<.3, 5, 2)
    xs = [known, *sample(uniform_net(8), p, (5, 16), steps=N, step=make(name), known=known, keep=known==5, rng=Rng(15))]
    assert len(xs)==N+1 and xs[-1].dtype==torch.long
    for a,b in zip(xs, xs[1:]):
        assert (b[a!=2]==a[a!=2]).all() or again(name)
        assert (b[known==5]==5).all() # at every step, not at the end alone
    assert (xs[-1]!=2).all() and ((xs[-1]>=0) & (xs[-1]<8)).all()
    if again(name) and N==50: assert any((b[a!=2]==2).any() for a,b in zip(xs, xs[1:]))

@each
def test_batch(name):
    "A text is the same in any batch: float64, a network with its head late, conditions, prompts and pads."
    net, y = Net(), torch.linspace(-1, 1, 6, dtype=F64)
    known = torch.where(Rng(16).uniform(6, 14)<.2, 5, 8)
    mask = torch.arange(14)<torch.tensor([14, 11, 14, 9, 12, 14])[:,None]
    def run(pick, **kw):
        i = torch.tensor(pick)
        return last(net, P8, (len(pick), 14), steps=6, step=make(name), cond=dict(y=y[i]), known=known[i], keep=known[i]<8, mask=mask[i],
            rng=Rng(17).of(pick), **kw)
    for kw in (dict(), dict(w=2.)):
        whole = run([0, 1, 2, 3, 4, 5], **kw)
        assert len(whole.unique(dim=0))==6
        for pick in ([3], [4, 1]): assert (run(pick, **kw)==whole[pick]).all()

@each
def test_with_and_without_a_late_head(name):
    "A function has no head of its own: the whole output, of the whole batch, is computed. The tokens are the same."
    net, known = Net(), torch.where(Rng(18).uniform(6, 14)<.2, 5, 8)
    def f(x, net_t, **cond): return net(x, net_t.expand(len(x)), **cond)
    kw = dict(steps=9, step=make(name), known=known, keep=known<8, rng=Rng(19))
    assert (last(net, P8, (6, 14), **kw)==last(f, P8, (6, 14), **kw)).all()

@each
def test_guidance(name):
    "w = 1 is the conditional network, bit for bit and call for call; w = 3 is not; no prompt is touched, though the other branch does not see it."
    known = cyclic_text(3).x
    keep, y = (torch.arange(16)<5).expand(3, 16), torch.tensor([1., 0., -1.], dtype=F64)
    def run(**kw):
        net = Net()
        xs = list(sample(net, P8, (3, 16), steps=6, step=make(name), cond=dict(y=y), known=known, keep=keep, rng=Rng(20), **kw))
        for x in xs: assert (x[keep]==known[keep]).all()
        return xs[-1], net.calls
    (a,n), (b,m), (c,k) = run(), run(w=1.), run(w=3.)
    assert (a==b).all() and n==m and (a!=c).any() and k>=2
    assert (run(uncond=dict(y=0*y))[0]==a).all()
    late, whole = run(w=3.)[0], run(guide=constant(3.))[0] # given as a guide, it gets the network as it is
    assert (late==whole).all()
    assert (run(guide=interval(1., 0., 1.))[0]==a).all() and (run(guide=interval(3., .5, 1.))[0]!=a).any()

def test_what_the_other_branch_sees():
    seen = []
    class Spy(Net):
        def features(self, x, net_t, **cond):
            seen.append((x.clone(), cond.get('y')))
            return super().features(x, net_t, **cond)
    known, keep = cyclic_text(3).x, (torch.arange(16)<5).expand(3, 16)
    last(Spy(), P8, (3, 16), steps=4, step=confident(), cond=dict(y=torch.ones(3, dtype=F64)), known=known, keep=keep, w=2., rng=Rng(21))
    assert len(seen)==8
    for x,y in seen: assert (x[keep]==8).all() if y is None else (x[keep]==known[keep]).all()
    assert sum(y is None for _,y in seen)==4

# --- in law ---
def result(p, N, step=lambda p, t, s, a, b: p.reveal(t, s)):
    "Distribution of the samples of N even steps over the 64 states, from `reveal` and `estimate`, without drawing."
    words, hidden = p.estimate(CALL, STATES, torch.ones(1)).logits.exp(), (STATES==3)[...,None]
    t = torch.linspace(1, 0, N+1, dtype=F64)
    dist = (STATES==3).all(1).double()
    for i in range(N):
        r = p.reveal(t[i], t[i+1])
        dist = dist@torch.einsum('xi,xj,xk->xijk', *torch.cat([torch.where(hidden, r, 1.)*words, hidden*(1-r)], -1).unbind(1)).flatten(1)
    return dist.view(4, 4, 4)

def test_total_variation_halves():
    got = [tv(result(TINY, 2**k), FULL) for k in range(8)]
    want = [.2418, .1258, .0644, .0326, .0164, .0082, .0041, .0021]
    assert all(abs(a-b)<6e-5 for a,b in zip(got, want)), got
    assert 1.98<got[-2]/got[-1]<2.02
    once = LANG.conditionals(torch.full((1, 3), 3))[0].exp()
    assert tv(result(TINY, 1)[:3,:3,:3], torch.einsum('i,j,k->ijk', *once))<1e-12

@pytest.mark.parametrize('step', [plain(), ancestral(), remask(scaled(0.))], ids=['plain', 'lazy', 'nothing hidden again'])
@pytest.mark.parametrize('N', [1, 4])
def test_samples_have_that_distribution(step, N):
    n, want = 30_000, result(TINY, N)
    got = histogram(last(CALL, TINY, (n, 3), steps=N, step=step, rng=Rng(5)))
    assert close(got, want, n)
    assert tv(got, want)<.02<tv(got, FULL) # it can tell 4 steps from infinitely many

@pytest.mark.parametrize('rank', [random_rank, margin, neg_entropy])
def test_one_at_a_time_is_exact(rank):
    n = 30_000
    assert close(histogram(last(CALL, TINY, (n, 3), steps=3, step=confident(rank), rng=Rng(6))), FULL, n)

def test_a_rank_that_looks_at_the_token_is_not():
    "Unlucky draws are put back: probable sentences become more probable. Known, and said where it is exported."
    x = last(CALL, TINY, (30_000, 3), steps=3, step=confident(top_prob), rng=Rng(6))
    assert tv(histogram(x), FULL)>.2 and LANG.log_prob(x).mean()>(LANG.p*LANG.p.log()).sum()+.3

@pytest.mark.parametrize('N', [1, 3])
@pytest.mark.parametrize('schedule', ['straight', 'cosine', 'linear_noise'])
def test_first_hitting_is_exact(N, schedule):
    "In any number of steps, for any schedule; with 4 steps `ancestral` is off by .06."
    n = 30_000
    got = histogram(last(CALL, Masked(schedule, 3, 3), (n, 3), steps=N, step=first_hitting(), rng=Rng(7)))
    assert close(got, FULL, n) and tv(got, FULL)<.02

def test_first_hitting_without_drawing():
    "Each call places one token of each text, all orders are equally likely, and that, computed, is the language itself."
    orders, xs = [], []
    def spy(x, net_t, **cond):
        xs.append(x.clone())
        return LANG.conditionals(x)
    x = last(spy, TINY, (6000, 3), steps=1, step=first_hitting(), rng=Rng(8))
    assert len(xs)==3
    for a,b in zip(xs, [*xs[1:], x]):
        new = (a==3) & (b!=3)
        assert (new.sum(1)==1).all() and (a[a!=3]==b[a!=3]).all()
        orders.append(new.int().argmax(1))
    count = (orders[0]*3+orders[1]).bincount(minlength=9)[[1, 2, 3, 5, 6, 7]].double()
    assert ((count-1000)**2/1000).sum()<20.5 # 5 degrees of freedom: exceeded once in a thousand
    words, p = TINY.estimate(CALL, STATES, torch.ones(1)).logits.exp(), (STATES==3).all(1).double()
    hidden = (STATES==3).double()
    for _ in range(3):
        new = torch.zeros(64, dtype=F64)
        for i in range(3):
            q = torch.eye(4, dtype=F64)[STATES]
            q[:,i] = F.pad(words[:,i], (0, 1))
            new += (p*hidden[:,i]/hidden.sum(1).clamp(min=1))@torch.einsum('xi,xj,xk->xijk', *q.unbind(1)).flatten(1)
        p = new
    assert tv(p.view(4, 4, 4), FULL)<1e-12

@pytest.mark.parametrize('schedule,N', [('straight', 1), ('straight', 3), ('poly', 1), ('log_hidden', 2), ('geometric', 1)])
def test_hitting_times(schedule, N):
    "The network is told the moments: in terms of the hidden share they are uniform numbers in falling order."
    p, times = Masked(schedule, 8, 8), []
    def net(x, net_t, **cond):
        times.append((net_t.expand(len(x)), (x==8).sum(1)))
        return torch.zeros(*x.shape, 8)
    last(net, p, (300, 8), steps=N, step=first_hitting(), rng=Rng(9))
    t,left = (torch.cat(o) for o in zip(*times))
    t,left = t[t>0], left[t>0] # 0 is for texts in which nothing is due
    lam = p.schedule(t)[1]
    assert len(t)==300*8 # one token at a time
    for k in range(1, 9):
        o = lam[left==9-k]
        sd = (k*(9-k)/(81*10))**.5 # of the k-th of eight uniform numbers
        assert len(o)==300 and abs(o.mean()-(9-k)/9)<4.2*sd/300**.5, k

def test_first_hitting_stays_in_its_step():
    "At each point of the grid as many are hidden as the schedule says, and what the network is told lies between two points."
    told, t = [], torch.linspace(1, 0, 6, dtype=F64)
    def net(x, net_t, **cond):
        told[-1].append(net_t)
        return torch.zeros(*x.shape, 8)
    p, step, x = Masked('poly', 8, 8), first_hitting(), torch.full((500, 8), 8)
    for i in range(5):
        told.append([])
        x = step(p, net, x, uniform()(p, 5), i, {}, Rng(9, step=i))
        assert abs((x==8).double().mean()-t[i+1]**2)<4.2*.5/4000**.5
        o = torch.stack(told[-1])
        assert ((o==0) | ((o<=t[i]) & (o>=t[i+1]))).all() # 0 for texts without anything due: their rows are not used

# --- calls ---
class Counter:
    "A network that looks at all tokens, and counts its calls."
    def __init__(self, w=None): self.n, self.w = 0, w if w is not None else Rng(17).normal(9, 8)
    def __call__(self, x, net_t, **cond):
        self.n += 1
        return self.w[x].mean(1, keepdim=True)*5+torch.zeros(*x.shape, 8)

@pytest.mark.parametrize('N', [8, 60])
def test_lazy_is_plain(N):
    a,b = Counter(), Counter()
    for r in range(5):
        x,y = (last(net, P8, (2, 16), steps=N, step=f, rng=Rng(r)) for net,f in ((a, ancestral()), (b, plain())))
        assert (x==y).all()
    assert b.n==5*N and (a.n<5*N if N==60 else a.n<=5*N)

@pytest.mark.parametrize('N,L', [(32, 128), (128, 128), (100, 20)])
def test_number_of_calls(N, L):
    used, R = [], 5
    for r in range(R):
        net = Counter()
        last(net, Masked('straight', 8, 8), (1, L), steps=N, step=ancestral(), rng=Rng(r))
        used.append(net.n)
    used, q = torch.tensor(used).double(), 1-1/N
    var = N*q**L*(1-q**L)+N*(N-1)*((1-2/N)**L-q**(2*L)) # of the number of occupied boxes: L balls in N boxes
    want = N*(1-q**L)
    assert abs(used.mean()-want)<3*(var/R)**.5 and ((used-want).abs()<3.5*var**.5+1).all(), (used, want)

def test_a_batch_costs_what_its_texts_cost():
    "Only texts in which something is due go through the body, only the positions due through the head."
    net, alone = Net(), []
    x = last(net, P8, (6, 14), steps=40, step=ancestral(), rng=Rng(22))
    texts, rows = net.texts, net.rows
    for i in range(6):
        one = Net()
        assert (last(one, P8, (1, 14), steps=40, step=ancestral(), rng=Rng(22).of([i]))==x[i]).all()
        alone.append(one.texts)
        assert one.texts==one.calls<40
    assert texts==sum(alone) and rows==6*14 and net.calls<=40
    net = Net()
    last(net, P8, (6, 14), steps=5, step=first_hitting(), rng=Rng(22))
    assert net.texts==net.rows==6*14
    net = Net()
    last(net, P8, (6, 14), steps=7, step=confident(), rng=Rng(22))
    assert net.texts==6*7 and net.rows==6*sum(range(2, 15, 2)) # hidden rows at each step, and no visible one
    net = Net()
    last(net, P8, (6, 12), steps=12, step=blocks(size=3), rng=Rng(22))
    assert net.texts==6*12 and net.rows==6*4*(3+2+1) # of the block alone

def test_finished_texts_ask_nothing():
    net = Net()
    x = last(net, P8, (2, 14), steps=10, step=confident(), known=torch.full((2, 14), 3), keep=torch.tensor([[True]*14, [True]*13+[False]]))
    assert net.texts==1 and (x[0]==3).all()

# --- confidence ---
def grid_of(n): return uniform()(Masked('straight', 8, 8), n)

def test_shares():
    def split(m, N, f=even, p=P8):
        out = []
        for i in range(N):
            out.append(int(f(torch.tensor([m]), p, uniform()(p, N), i)))
            m -= out[-1]
        assert m==0
        return out
    assert split(10, 4)==[3, 3, 2, 2]
    for m in range(20):
        for N in range(1, 12): assert split(m, N)==[m//N+(i<m%N) for i in range(N)]
    straight = Masked('straight', 8, 8)
    for m,N in ((10, 4), (7, 5), (3, 9)): # Dream: int(m (1-s/t)), in the last step all
        t, left, want = torch.linspace(1, 0, N+1, dtype=F64), m, []
        for i in range(N):
            want.append(math.floor(left*(1-t[i+1]/t[i])+1e-12))
            left -= want[-1]
        assert split(m, N, scheduled, straight)==want
    split(16, 5, scheduled, Masked('md4_cosine', 8, 8))

@pytest.mark.parametrize('rank', [top_prob, margin, neg_entropy, random_rank])
def test_highest_rank_first(rank):
    p, seen = Masked('straight', 8, 8), {}
    x0 = cyclic_text(40).x
    x = p.corrupt(x0, torch.linspace(0, 1, 40), rng=Rng(19))[0]
    raw = 3*Rng(20).normal(40, 16, 8, dtype=F64)
    def spy(logp, tokens, u):
        out = rank(logp, tokens, u)
        seen.setdefault('score', []).append(out)
        seen.setdefault('tokens', []).append(tokens)
        return out
    for i in range(4):
        seen.clear()
        x_s = confident(spy)(p, lambda x, net_t: raw, x, grid_of(4), i, {}, Rng(21))
        where = (x==8)
        score, tokens = torch.full((40, 16), torch.nan, dtype=F64), x.clone()
        score[where], tokens[where] = torch.cat(seen['score']).double(), torch.cat(seen['tokens'])
        for j in range(40):
            hidden = [k for k in range(16) if x[j,k]==8]
            best = sorted(sorted(hidden, key=lambda k: -score[j,k])[:-(-len(hidden)//(4-i))])
            assert [k for k in range(16) if x_s[j,k]!=x[j,k]]==best
            assert (x_s[j,best]==tokens[j,best]).all()

def test_ranks():
    q = torch.softmax(2*Rng(22).normal(15, 6, dtype=F64), -1)
    tokens, u = Rng(23).integers(6, 1, 15)[0], Rng(24).uniform(1, 15)[0]
    got = {f: f(q.log(), tokens, u) for f in (top_prob, margin, neg_entropy, random_rank)}
    for i in range(15):
        o, big = q[i], sorted(q[i].tolist())
        assert abs(got[top_prob][i]-o[tokens[i]])<1e-12
        assert abs(got[margin][i]-(big[-1]-big[-2]))<1e-12
        assert abs(got[neg_entropy][i]-(o*o.log()).sum())<1e-12
    assert neg_entropy(torch.tensor([[0., -torch.inf]]), tokens[:1], u[:1])==0 # 0 log 0
    assert (got[random_rank]==u).all()

def test_a_rank_of_infinities_leaves_no_mask():
    p = Masked('straight', 8, 8)
    known = torch.where(torch.arange(16)<4, 1, 8).expand(2, 16)
    step = confident(lambda logp, x, u: torch.full(x.shape, -torch.inf))
    x0 = last(uniform_net(8), p, (2, 16), steps=3, step=step, known=known, keep=known<8)
    assert (x0<8).all()

def test_highest():
    score = torch.tensor([[1., 3., 3., 2.], [-torch.inf, 0., -torch.inf, 1.]], dtype=F64)
    assert highest(score, torch.tensor([2, 1])).tolist()==[[False, True, True, False], [False, False, False, True]]
    assert highest(score, torch.tensor([1, 0])).tolist()==[[False, True, False, False], [False]*4]

def test_alg_temp():
    "Positions come by softmax(score/T), without replacement: the law of the first pair against the formula; near 0 it is the best."
    n, c = 20_000, torch.tensor([.9, .5, .4, .2], dtype=F64)
    raw = torch.stack([torch.stack([o, (1-o)]) for o in c]).log().expand(n, 4, 2) # drawn greedily: top_prob is max(c, 1-c)
    p, x = Masked('straight', 2, 2), torch.full((n, 4), 2)
    sure = torch.maximum(c, 1-c)
    for T in (.1, .5):
        y = confident(narrow=narrow(0.), alg_temp=T)(p, lambda x, net_t: raw, x, uniform()(p, 2), 0, {}, Rng(25))
        pair = ((y!=2)*torch.tensor([8, 4, 2, 1])).sum(1).bincount(minlength=16)/n
        q = (sure/T).softmax(0)
        for i in range(4):
            for j in range(i):
                want = q[i]*q[j]/(1-q[i])+q[j]*q[i]/(1-q[j])
                assert abs(pair[2**(3-i)+2**(3-j)]-want)<4.2*(want*(1-want)/n)**.5, (T, i, j)
    a = confident(random_rank, alg_temp=1e-9)(p, lambda x, net_t: raw, x, uniform()(p, 2), 0, {}, Rng(26))
    b = confident(random_rank)(p, lambda x, net_t: raw, x, uniform()(p, 2), 0, {}, Rng(26))
    assert (a==b).all()

def test_threshold():
    p = Masked('straight', 8, 8)
    raw = 3*Rng(27).normal(30, 16, 8, dtype=F64)
    x = p.corrupt(cyclic_text(30).x, torch.linspace(0, 1, 30), rng=Rng(28))[0]
    q, call = raw.softmax(-1), lambda x, net_t: raw
    for least in (.5, .9, 2.):
        y = threshold(least, narrow(0.))(p, call, x, grid_of(4), 1, {}, Rng(29))
        for j in range(30):
            hidden = [k for k in range(16) if x[j,k]==8]
            want = {k for k in hidden if q[j,k].max()>=least} or {max(hidden, key=lambda k: q[j,k].max())} if hidden else set()
            assert {k for k in range(16) if y[j,k]!=x[j,k]}==want
    assert (threshold(2.)(p, call, x, grid_of(4), 3, {}, Rng(29))<8).all() # the last step uncovers the rest

def test_entropy_bound():
    "The positions of diffusers' EntropyBoundScheduler, and those of a plain loop."
    p = Masked('straight', 8, 8)
    raw = 3*Rng(30).normal(30, 16, 8, dtype=F64)
    x = p.corrupt(cyclic_text(30).x, torch.linspace(0, 1, 30), rng=Rng(31))[0]
    h, call = torch.special.entr(raw.softmax(-1)).sum(-1), lambda x, net_t: raw
    for bound in (0., .1, 1., 5., 100.):
        y = entropy_bound(bound)(p, call, x, grid_of(4), 1, {}, Rng(32))
        for j in range(30):
            total, want = 0., set()
            for k in sorted((k for k in range(16) if x[j,k]==8), key=lambda k: h[j,k]):
                if total<=bound: want.add(k)
                total += h[j,k].item()
            assert {k for k in range(16) if y[j,k]!=x[j,k]}==want
    assert (entropy_bound(0.)(p, call, x, grid_of(4), 3, {}, Rng(32))<8).all()

def test_entropy_bound_of_diffusers():
    from diffusers import EntropyBoundScheduler
    theirs = EntropyBoundScheduler(entropy_bound=.7, t_max=1., t_min=1.)
    p, raw = Masked('straight', 8, 8), 4*Rng(33).normal(20, 16, 8, dtype=F64)
    ours = entropy_bound(.7)(p, lambda x, net_t: raw, torch.full((20, 16), 8), grid_of(4), 0, {}, Rng(34))<8
    theirs.set_timesteps(4)
    out = theirs.step(raw, theirs.timesteps[0], torch.full((20, 16), 0), generator=torch.Generator().manual_seed(0))
    assert (out.accepted_index==ours).all() and 0<ours.double().mean()<1

# --- narrowing ---
def test_temperature():
    raw = Rng(25).normal(1, 1, 8).expand(500, 16, 8)
    p, net = Masked('straight', 8, 8), lambda x, net_t, **cond: raw
    for f in (ancestral, first_hitting, threshold, entropy_bound, lambda narrow: confident(narrow=narrow), lambda narrow: remask(narrow=narrow)):
        assert (last(net, p, (500, 16), steps=4, step=f(narrow=narrow(0.)))==raw.argmax(-1)).all()
    for o in (narrow(.5), narrow(), narrow(2.), narrow(1.2, 4), narrow(p=.7)):
        share = last(net, p, (500, 16), steps=1, step=ancestral(o)).flatten().bincount(minlength=8)/8000
        assert close(share, o(raw[0,0].double()).softmax(-1), 8000)

def test_ranks_see_the_network_not_what_is_drawn_from():
    raw, seen = Rng(26).normal(1, 4, 8, dtype=F64), []
    def spy(logp, tokens, u):
        seen.append(logp)
        return u
    last(lambda x, net_t: raw.expand(len(x), 4, 8), Masked('straight', 8, 8), (1, 4), steps=1, step=confident(spy, narrow(.1, 2)))
    assert torch.allclose(seen[0], raw[0].log_softmax(-1))

def test_place():
    "Only where asked; each number belongs to a position, whatever else is asked."
    p, x, raw = Masked('straight', 8, 8), torch.full((50, 16), 8), Rng(35).normal(50, 16, 8, dtype=F64)
    where = Rng(36).uniform(50, 16)<.5
    y,score = place(p, lambda x, net_t: raw, x, where, torch.ones(1), Rng(37), rank=top_prob)
    z,_ = place(p, lambda x, net_t: raw, x, torch.ones_like(where), torch.ones(1), Rng(37), rank=top_prob)
    assert (y[~where]==8).all() and (y[where]<8).all() and (y[where]==z[where]).all()
    assert (score[~where]==-torch.inf).all() and torch.allclose(score[where], raw.softmax(-1).gather(-1, y.clamp(max=7)[...,None])[...,0][where])

# --- blocks ---
@pytest.mark.parametrize('n,size,start,N', [(16, 4, 0, 8), (16, 5, 2, 9), (12, 4, 3, 2), (7, 32, 0, 3), (9, 1, 0, 9), (16, 4, 0, 7)])
def test_blocks_from_left_to_right(n, size, start, N):
    p = Masked('straight', 8, 8)
    xs = [torch.full((3, n), 8), *sample(uniform_net(8), p, (3, n), steps=N, step=blocks(size=size, start=start), rng=Rng(38))]
    block = ((torch.arange(n)-start)//size).clamp(min=0)
    m = int(block.max())+1
    for i,(a,b) in enumerate(zip(xs, xs[1:])):
        new = block[((a==8) & (b!=8)).any(0)]
        if N>=m: assert len(new.unique())<=1 and (len(new)==0 or new[0]==i*m//N)
        left = block[(b==8).any(0)]
        assert len(left)==0 or len(new)==0 or new.max()<=left.min()
    assert (xs[-1]<8).all()
    if N>=m: # steps are split evenly, and so are the tokens over a block's steps
        steps = [sum(i*m//N==j for i in range(N)) for j in range(m)]
        assert max(steps)-min(steps)<=1
        done = [((a==8) & (b!=8))[0].sum().item() for a,b in zip(xs, xs[1:])]
        for j in range(m):
            mine, many = [d for i,d in enumerate(done) if i*m//N==j], int((block==j).sum())
            assert mine==[many//len(mine)+(k<many%len(mine)) for k in range(len(mine))]

@pytest.mark.parametrize('inner', [ancestral, first_hitting, confident, threshold, entropy_bound, lambda: remask(scaled(.5))],
    ids='ancestral hitting confident threshold entropy remask'.split())
def test_every_sampler_keeps_to_its_block(inner):
    net = lambda x, net_t: torch.linspace(0, 9, 8).expand(*x.shape, 8)
    xs = list(sample(net, Masked('straight', 8, 8), (5, 12), steps=9, step=blocks(inner(), 4), rng=Rng(38)))
    for i,x in enumerate(xs):
        j = i//3
        assert (x[:,4*(j+1):]==8).all() and (x[:,:4*j]<8).all()
        if i%3==2: assert (x[:,4*j:4*j+4]<8).all()

def test_one_block_is_the_sampler_itself():
    p = Masked('cosine', 8, 8)
    for f in (ancestral(), confident(margin), first_hitting(), remask(scaled(.3))):
        a,b = (last(Counter(), p, (4, 16), steps=6, step=o, rng=Rng(39)) for o in (f, blocks(f, 16)))
        assert (a==b).all()
    for bad in (dict(size=0), dict(start=-1)):
        with pytest.raises(ValueError, match='blocks have'): blocks(**bad)

def test_blocks_leave_finished_ones_alone():
    p = Masked('straight', 8, 8)
    xs = list(sample(uniform_net(8), p, (20, 16), steps=40, step=blocks(remask(scaled(1.)), 4), rng=Rng(40)))
    for i,x in enumerate(xs): assert (x[:,:4*((i+1)*4//40)]<8).all()

# --- thinking again ---
@pytest.mark.parametrize('share', [0., .5, 1.])
@pytest.mark.parametrize('schedule', ['straight', 'cosine', 'poly', 'geometric'])
def test_remasking_keeps_the_marginal(share, schedule):
    "Computed from the two probabilities, and drawn: at each time as many are visible as in the process."
    p = Masked(schedule, 8, 8)
    t = uniform()(p, 8).t
    for i in range(7):
        at, as_ = p.schedule(t[i])[0], p.schedule(t[i+1])[0]
        sigma = share*min(1, (1-as_)/at) if at>0 else torch.tensor(share)
        reveal, stay = (as_-(1-sigma)*at)/(1-at), (1-as_-sigma*at)/(1-at)
        assert abs(at*(1-sigma)+(1-at)*reveal-as_)<1e-12 and abs(reveal+stay-1)<1e-12 and -1e-12<=stay
        if share==1 and at>0 and (1-as_)/at<1: assert abs(stay)<1e-12 # nothing stays hidden
    xs = list(sample(uniform_net(8), p, (2000, 8), steps=8, step=remask(scaled(share)), rng=Rng(41)))
    for i in range(7):
        want = (p.hidden_share(t[i+1])).item()
        assert abs((xs[i]==8).double().mean()-want)<4.5*(want*(1-want)/16_000)**.5+1e-9, i

def test_hidden_again_as_often_as_asked():
    n, p = 4000, Masked('straight', 8, 8)
    x = p.corrupt(torch.zeros(n, 8, dtype=torch.long), torch.tensor([.6]), rng=Rng(42))[0]
    grid = Grid(torch.tensor([.6, .5, 0.], dtype=F64), torch.tensor([.6, .5, torch.nan], dtype=F64))
    for rule,want in ((capped(.1), .1), (capped(.9), .9), (scaled(.3), .3), (scaled(0.), 0.)):
        y = remask(rule)(p, uniform_net(8), x, grid, 0, {}, Rng(43)) # sigma_max = min(1, .5/.4) = 1
        share = (y[x<8]==8).double().mean()
        assert abs(share-want)<4.5*(want*(1-want)/(x<8).sum())**.5+1e-9
        again = (y[x==8]<8).double().mean()
        odds = (.5-(1-want)*.4)/.6
        assert abs(again-odds)<4.5*(odds*(1-odds)/(x==8).sum())**.5
    late = Grid(torch.tensor([.1, .05, 0.], dtype=F64), torch.tensor([.1, .05, torch.nan], dtype=F64))
    x = p.corrupt(torch.zeros(n, 8, dtype=torch.long), torch.tensor([.1]), rng=Rng(44))[0]
    y = remask(capped(.9))(p, uniform_net(8), x, late, 0, {}, Rng(45)) # sigma_max = .05/.9: and all hidden ones are revealed
    want = .05/.9
    assert (y[x==8]<8).all() and abs((y[x<8]==8).double().mean()-want)<4.5*(want*(1-want)/(x<8).sum())**.5

def test_nothing_hidden_again_is_ancestral():
    for rule in (scaled(0.), capped(0.), unsure(0.)):
        a,b = (last(Counter(), P8, (4, 16), steps=20, step=f, rng=Rng(46)) for f in (remask(rule), ancestral()))
        assert (a==b).all()
    a,b = (last(Counter(), P8, (4, 16), steps=20, step=f, rng=Rng(46)) for f in (remask(scaled(1.), during=(0., 0.)), ancestral()))
    assert (a==b).all()

def test_unsure():
    "By softmax of minus the probabilities, over visible tokens; the prompt, of infinite certainty, never."
    sure = torch.tensor([[.9, .2, torch.inf, .5], [torch.inf]*4], dtype=F64)
    visible = torch.tensor([[True, True, True, False], [True, False, True, True]])
    got = unsure(.5)(torch.tensor(.8, dtype=F64), sure, visible)
    e = [math.exp(-.9), math.exp(-.2)]
    assert torch.allclose(got, .4*torch.tensor([[e[0]/sum(e), e[1]/sum(e), 0, 0], [0]*4], dtype=F64))
    state, p = {}, Masked('straight', 8, 8)
    raw = 3*Rng(47).normal(1, 16, 8, dtype=F64).expand(50, 16, 8)
    x = torch.full((50, 16), 8)
    x[:,:3] = 5
    for i in range(3):
        y = remask(unsure())(p, lambda x, net_t: raw, x, uniform()(p, 6), i, state, Rng(48, step=i))
        new = (x==8) & (y<8)
        assert torch.allclose(state['sure'][new], raw.softmax(-1).gather(-1, y.clamp(max=7)[...,None])[...,0][new])
        assert (state['sure'][:,:3]==torch.inf).all() and (y[:,:3]==5).all()
        x = y

def test_loop():
    "The schedule pauses at the level, between the two times; in the pause alone are tokens hidden again."
    a = plateau(.6, .2, .9)
    t = torch.tensor([1., .8, .61, .6, .4, .2, .1, 0.], dtype=F64)
    assert torch.allclose(a(t), torch.tensor([0, .45, .9*.39/.4, .9, .9, .9, .95, 1.], dtype=F64))
    p, told = Masked('poly', 8, 8), []
    def net(x, net_t, **cond):
        told.append(net_t.item())
        return torch.zeros(*x.shape, 8)
    grid = uniform()(p, 30).t
    xs = [torch.full((3000, 8), 8), *sample(net, p, (3000, 8), steps=30, step=loop(.6, .2, .9, .05), rng=Rng(49))]
    for i,(x,y) in enumerate(zip(xs, xs[1:])):
        share = (y<8).double().mean()
        assert abs(share-a(grid[i+1]))<4.5*.5/24_000**.5, i
        gone = (y[x<8]==8).double().mean() if (x<8).any() else 0.
        if .2<grid[i]<=.6+1e-9 and grid[i+1]>=.2-1e-9: assert abs(gone-.05)<.01, i
        elif not .2<grid[i]<=.6+1e-9: assert gone==0, i
    want = (1-a(grid[:-1])).sqrt() # poly: hidden = t^2, so the network is told the time at which as many are hidden
    assert all(min(abs(o-w) for w in want)<1e-6 for o in told)

@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_any_remasking(a, b, share):
    "For any two times and any share of what is allowed, both are probabilities."
    lo,hi = sorted((a, b))
    rule = scaled(share)
    most = min(1., (1-hi)/lo) if lo>0 else 1.
    sigma = rule(torch.tensor(most, dtype=F64), None, None)
    if lo<1:
        reveal = (hi-(1-sigma)*lo)/(1-lo)
        assert -1e-9<=reveal<=1+1e-9 and 0<=sigma<=1

# --- what is asked of the network ---
class Counted(Denoiser):
    "A network that adds up the rows for which its head was run."
    def __init__(self): super().__init__(); self.rows = 0
    def features(self, x, net_t, **cond): return Feats(torch.linspace(0, 1, 7, dtype=torch.float64)+(x[...,None]==7)*.3+x[...,None]/9)
    def head(self, feats):
        self.rows += feats.h[...,0].numel()
        return feats.h.cos()

@pytest.mark.parametrize('alg_temp', [0., .5])
def test_a_random_order_asks_only_where_a_token_is_placed(alg_temp):
    "All 36 tokens, one row of the head each; a rank that looks at the network asks at all that is hidden."
    net, p = Counted(), Masked('straight', 7, 7)
    *_, x = sample(net, p, (3, 12), steps=5, step=confident(random_rank, alg_temp=alg_temp), rng=Rng(3))
    assert net.rows==36 and (x!=7).all()
    other = Counted()
    for _ in sample(other, p, (3, 12), steps=5, step=confident(top_prob), rng=Rng(3)): pass
    assert other.rows==3*(12+9+6+4+2)

@pytest.mark.parametrize('alg_temp', [0., .5])
def test_a_random_order_is_the_rank_by_a_random_number(alg_temp):
    "The same tokens as the same rank in a function of another name, which is asked for at all hidden positions."
    p, net = Masked('cosine', 7, 7), Counted()
    def any_rank(logp, x0, u): return random_rank(logp, x0, u)
    a, b = (list(sample(net, p, (3, 12), steps=5, step=confident(r, alg_temp=alg_temp), rng=Rng(4))) for r in (random_rank, any_rank))
    assert all(torch.equal(x, y) for x,y in zip(a, b))
