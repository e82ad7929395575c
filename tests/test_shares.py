"What a rank holds, sends and computes: the formulas, beside what real processes say and keep."
from collections import Counter
from functools import partial
import pytest, torch
from diffnb.bench import operations, state_bytes, traffic
from diffnb.bench.shares import SAID, WAYS, counts, heard, saved, sent, shared, shares, spoken, step, travelled
from diffnb.core import create
from diffnb.models.layers import frugal, units
from diffnb.train.parallel import added, cut, forked, joined
from diffnb.train.spread import route

D, N, L, H = 32, 16, 2, 8 # width, tokens, blocks, heads
CASES = dict(dit=lambda: create('dit', depth=L, dim=D, heads=H, size=8), mlm=lambda: create('mlm_tiny', dim=D, heads=H, time=0, depth=L),
             flux=lambda: create('flux', ch=4, dim=8*12, heads=H, doubles=1, singles=2, ctx=24, vec=12, axes=(4, 4, 4), demo=(8, 8, 8)),
             dimba=lambda: create('dimba_tiny', dim=64), moe=lambda: create('dit_moe_tiny', size=8))

def ask(net, b=1):
    x, t, cond = net.demo(b)
    like = next(net.parameters())
    return net(x.to(like) if x.is_floating_point() else x, t.to(like), **cond)

def outcome(net, b=1):
    "Bytes given to each function, there and back."
    with heard() as n: torch.autograd.grad(ask(net, b).sum(), [p for p in net.parameters()], allow_unused=True)
    return dict(n)

def real(way, world):
    "What each process of a real group finds."
    with joined('ddp'):
        out = {}
        for k,make in CASES.items():
            if way=='tokens' and k not in ('dit', 'flux'): continue
            net = WAYS[way](make())
            with torch.no_grad(): work = operations(lambda: ask(net))
            out[k] = dict(operations=work, **saved(lambda: ask(net), net), **{**dict.fromkeys(SAID, 0), **outcome(net)})
        return out

@pytest.fixture(scope='module')
def found(): return {way: forked(2, partial(real, way, 2)) for way in WAYS}

@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('way', WAYS)
def test_pretended_is_real(found, way, case):
    "Messages, activations and operations of one who pretends to be the first of two."
    if case not in found[way][0]: pytest.skip('no plan')
    got = counts(CASES[case](), ask, WAYS[way], 2)
    if way=='tokens': got['all_reduce'] = 4*got['parameters'] # every gradient is added
    for o in found[way]: assert o[case]=={k: v for k,v in got.items() if k!='parameters'}

def by_hand(case, way):
    "Numbers in sums, parts and exchanges of one of two, there and back."
    if case=='dit' and way=='tensor': return L*(4*N*D+D), L*6*D//2, 0 # c's gradient; modulations
    if case=='dit': return None, N*32//2, L*8*N*D//2 # pixels of a token
    if case=='flux' and way=='tensor': # text and image 8+16 tokens, one double block and two single ones
        d, n = 96, 24
        return 4*n*d+2*d + 2*(2*n*d+d) + 2*2*12*2, (2*6+2*3)*d//2, 0 # and gradients of the norms of a head
    if case=='flux': return None, 16*16//2, 3*8*24*96//2
    if case=='mlm': return L*4*N*D, 0, 0

@pytest.mark.parametrize('way, case', [('tensor', 'dit'), ('tokens', 'dit'), ('tensor', 'flux'), ('tokens', 'flux'), ('tensor', 'mlm')])
def test_messages_by_hand(found, way, case):
    o, (sums, parts, swaps) = found[way][0][case], by_hand(case, way)
    assert (o['all_gather'], o['all_to_all_single'])==(4*parts, 4*swaps) and (sums is None or o['all_reduce']==4*sums)

@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('way', WAYS)
def test_eight_from_two_and_four(way, case):
    if case=='moe': pytest.skip('where tokens go depends on what was sent')
    r = shares(net := CASES[case](), ask)
    if way not in r: pytest.skip('no plan')
    want = counts(net, ask, WAYS[way], 8)
    for k,v in want.items(): assert shared(r, k, way, 8)==pytest.approx(v, rel=1e-12)
    assert spoken(r, way, 8)==pytest.approx(sent(Counter({k: want[k] for k in SAID}), 8))

@pytest.mark.parametrize('size, d, h', [(8, 64, 4), (8, 32, 2), (16, 32, 4)])
def test_a_block_by_hand(size, d, h):
    "What a block keeps, and multiplies; and what is left of it if it is computed again."
    one, two = (create('dit', depth=k, dim=d, heads=h, size=size) for k in (1, 2))
    n, (a, b) = (size//2)**2, (saved(lambda: ask(o), o) for o in (one, two))
    assert [(b[k]-a[k])//4 for k in ('activations', 'kept', 'widest')]==[20*n*d+h*n**2+4*n+9*d, n*d, 0]
    with torch.no_grad(): assert operations(lambda: ask(two))-operations(lambda: ask(one))==24*n*d**2+4*n**2*d+12*d**2

@pytest.mark.parametrize('case', ['dit', 'mlm', 'flux', 'dimba'])
def test_kept_is_kept(case):
    "Blocks that are really computed again keep what was foretold, and work once more there."
    net = CASES[case]()
    want, again = saved(lambda: ask(net), net), frugal(CASES[case](), remat=True)
    got = saved(lambda: ask(again), again)
    assert got['kept']==want['kept'] and got['activations']<=want['kept']<want['activations'] and got['widest']==0
    once, twice = (operations(lambda: ask(o).sum().backward()) for o in (net, again))
    assert once<twice<=4/3*once

def data_parallel():
    with joined('ddp'):
        net = CASES['dit']()
        ddp = torch.nn.parallel.DistributedDataParallel(net)
        ddp.register_comm_hook(None, added)
        x, t, cond = net.demo(1)
        with heard() as n: ddp(x, t.float(), **cond).sum().backward()
        parts = cut(CASES['dit']())
        with heard() as m: ask(parts).sum().backward()
        every = sum(p.numel() for p in net.parameters())
        return n, m, every, every-sum(p.numel() for u in units(net) for p in u.parameters())

def test_state_and_traffic():
    "The ring formulas, beside what DDP and FSDP2 say: `features` and `head` each fetch what lies outside of blocks."
    for n,m,p,outside in forked(2, data_parallel):
        assert sent(n, 2)==traffic(4*p, 2, whole=True)
        assert sent(m, 2)==pytest.approx(traffic(4*p, 2)+2/3*traffic(4*outside, 2), rel=.005) # odd rows are padded

def experts():
    with joined('ddp'):
        net = route(CASES['moe']())
        got = outcome(net, 2)
        return got, sum(p.numel() for k,p in net.named_parameters() if '.experts.' in k), sum(p.numel() for k,p in net.named_parameters() if '.experts.' not in k)

def test_experts_travel():
    "Choices of all tokens, twice there and back; gradients of all else are added; each process has half of the experts."
    got, net = forked(2, experts), CASES['moe']()
    moes = [m for m in net.modules() if hasattr(m, 'experts')]
    choices, dim, layers = 2*16*moes[0].router.k, 64, len(moes)
    whole = sum(p.numel() for m in moes for p in m.experts.parameters())
    numbers = layers*8*len(moes[0].experts)*2 # of how many come: whole numbers of eight bytes, not answered
    assert sum(o[0]['all_to_all_single'] for o in got)-numbers==2*travelled(choices, dim, layers, 2)*2
    assert all(o[1]==whole//2 and o[0]['all_reduce']==4*o[2] for o in got)

def test_a_step():
    r = dict(parameters=1000, operations=10, activations=100, kept=20, widest=30)
    one, full = step(r), sum(state_bytes(1000).values())
    assert one==dict(state=full, activations=100, sent=0, operations=30)
    assert step(r, 4, remat=True)==dict(state=full/4, activations=50, sent=traffic(4000, 4), operations=40)
    assert step(r, 4, parts='none')==dict(state=full, activations=100, sent=traffic(4000, 4, True), operations=30)
    moe = dict(r, experts=800, choices=7, dim=5, layers=3)
    assert step(moe, 8)['sent']==traffic(4000, 8) and step(moe, 8, experts=8)['sent']==traffic(800, 8)+16*7*5*3*7/8
    with pytest.raises(ValueError, match='6 ranks are no groups of 4'): step(r, 6, world=4, way='tensor')
    with pytest.raises(ValueError, match='no plan'): step(r, 8, 'tokens', 4)
    two = shares(CASES['dit'](), ask)
    for n in (8, 64, 4096):
        o, p = step(two, n, 'tensor', 8), round(shared(two, 'parameters', 'tensor', 8))
        assert o['state']==pytest.approx(20*p/(n/8), rel=.01) or n==4096
        assert o['sent']==pytest.approx(traffic(4*p, n//8)+spoken(two, 'tensor', 8)) and o['operations']==3*shared(two, 'operations', 'tensor', 8)
