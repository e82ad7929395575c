"LoRA along the trajectory: counts, phases, the start, sums, ranks, penalties, routers, instructions, and that it learns."
import copy
import pytest, torch
from diffnb.guidance import bind, guided
from diffnb.peft.core import coverage, inner, merge, names, probe, remove, slots, switch
from diffnb.peft.files import combine, load_adapter, save_adapter, tensors
from diffnb.peft.lora import lora
from diffnb.peft.trajectory import Bank, Instruct, overlap, rank_penalty, router, trajectory, trajectory_part, width
from adapted import TINY, create, diff, gen, randomise, run, wake

SMALL = dict(ranks=(2, 3, 4), k=2, cond=8, vocab=12)

def test_counts():
    "The published sizes (spec: 622,720, 507,968, 421,904 and 1,552,592)."
    part = trajectory_part(torch.nn.Linear(1, 1), 768, ranks=(64, 32, 8), scales=(1, .5, .25), cond=256)
    n = [sum(p.numel() for p in b.parameters()) for b in part.banks]
    assert n==[622_720, 507_968, 421_904] and sum(p.numel() for p in part.parameters())==1_552_592

@pytest.mark.parametrize('concat', [False, True])
@pytest.mark.parametrize('name', TINY)
def test_identity_and_off(name, concat):
    "On every network, for pictures, latents and text, with instructions."
    base = randomise(create(name))
    x,t,cond = base.demo()
    with torch.no_grad(): want = base(x, t, **cond)
    net = trajectory(concat=concat, **SMALL)(base)
    x,t,cond = net.demo()
    assert 'instr' in cond and probe(net)==1
    with torch.no_grad():
        assert torch.equal(net(x, t, **cond), want)
        assert not torch.equal(wake(net)(x, t, **cond), want)
        assert torch.equal(switch(net, None)(x, t, **cond), want)
    assert remove(net, 'default') is base

def test_without_zeros_it_is_not_the_identity():
    net = trajectory(ranks=(2, 2, 2), zero=False)(randomise(create('dit_tiny')))
    assert not torch.equal(run(net), run(switch(net, None)))

def reference(part, h, t, c):
    "The equation, module by module, sample by sample; h `(b,n,d)`."
    from diffnb.models.layers import sinusoid
    out = torch.zeros_like(h)
    for b in range(len(h)):
        u = t[b].double()
        p = int((u>torch.tensor(part.bounds, dtype=u.dtype)).sum())
        bank,e = part.banks[p],sinusoid(u[None], h.shape[-1], 1000.)[0].float()
        r = bank.down.shape[0]//bank.k
        for i in range(bank.k):
            rows = slice(i*r, (i+1)*r)
            low = h[b]@bank.down[rows].T+e@(bank.down if bank.down_t is None else bank.down_t)[rows].T+bank.bias[rows]
            v = low.relu()*(1+bank.film[rows]@c[b])
            out[b] += part.scales[p]*(v@bank.up[:,rows].T+bank.shift[i]@c[b])
    return out

@pytest.mark.parametrize('concat', [False, True])
def test_is_its_equation(concat):
    "Sums over modules, phases in one batch, instructions."
    part = trajectory_part(torch.nn.Linear(1, 1), 16, ranks=(2, 3, 4), cond=5, concat=concat)
    g = gen()
    with torch.no_grad():
        for p in part.parameters(): p.normal_(std=.3, generator=g)
        h,t,c = torch.randn(5, 4, 16, generator=g),torch.tensor([.05, .4, .9, .6, 1/3]),torch.randn(5, 5, generator=g)
        want = reference(part, h, t, c)
        tol = 2e-6*want.abs().max().item()*4
        assert diff(part.delta(h, t, c), want)<tol
        assert diff(part.delta(h, t[:,None].expand(-1, 4), c), want)<tol # a time for each position
        for i in range(5): assert diff(part.delta(h[i:i+1], t[i:i+1], c[i:i+1]), want[i:i+1])<tol
        maps = trajectory_part(torch.nn.Linear(1, 1), 16, axis=1, ranks=(2, 3, 4), cond=5, concat=concat)
        maps.load_state_dict(part.state_dict())
        assert diff(maps.delta(h.mT.unflatten(2, (2, 2)), t, c), want.mT.unflatten(2, (2, 2)))<tol

def test_scales_and_phases():
    "Equal weights: sizes as 1 : 1/2 : 1/4 exactly; 34, 33 and 33 of 100 steps, bounds at 33|34 and 66|67."
    part = trajectory_part(torch.nn.Linear(1, 1), 16, ranks=(4, 4, 4), steps=100.)
    g = gen()
    for p in part.banks[0].parameters(): p.data.normal_(generator=g)
    for b in part.banks[1:]: b.load_state_dict(part.banks[0].state_dict())
    h = torch.randn(1, 3, 16, generator=g)
    with torch.no_grad():
        bank = part.banks[0]
        from diffnb.models.layers import sinusoid
        shares = []
        for i in range(100):
            t = torch.tensor([float(i)], dtype=torch.float64)
            shares.append((part.delta(h, t)/bank(h, sinusoid(t/100, 16, 1000.))).nanmean().item())
    assert [shares.count(o) for o in (.25, .5, 1.)]==[34, 33, 33] and shares==sorted(shares)

def test_a_bound_belongs_below():
    part = trajectory_part(torch.nn.Linear(1, 1), 16, ranks=(2, 2), scales=(1., 3.), bounds=(.5,))
    with torch.no_grad():
        for p in part.banks[0].parameters(): p.normal_(generator=gen())
        part.banks[1].load_state_dict(part.banks[0].state_dict())
        h,at = torch.randn(1, 4, 16, generator=gen(1)),torch.tensor([.5], dtype=torch.float64)
        near = part.delta(h, at-1e-12)
        assert diff(part.delta(h, at), near)<1e-5 and diff(part.delta(h, at+1e-12), 3*near)<1e-5

def test_rank_of_the_changes():
    part = trajectory_part(torch.nn.Linear(1, 1), 64, ranks=(3, 3, 3), k=2, cond=4)
    g = gen()
    with torch.no_grad():
        for p in part.parameters(): p.normal_(generator=g)
        d = part.delta(torch.randn(1, 500, 64, generator=g), torch.tensor([.9]), torch.randn(1, 4, generator=g))[0]
    S = torch.linalg.svdvals((d-d.mean(0)).double())
    assert S[5]>1e-2*S[0] and S[6]<1e-5*S[0]

def test_penalties():
    net = trajectory(ranks=(1,), scales=(1.,), bounds=())(randomise(create('dit_tiny')))
    bank = net.adapters['default'].banks[0]
    bank.down.data.zero_(); bank.up.data.zero_()
    bank.up.data[0,0],bank.up.data[1,1],bank.down.data[0,3] = 2., 5., 3.
    assert overlap(net).item()==0 and rank_penalty(net).item()==4+25+9
    bank.up.data[0,1] = 3.
    assert overlap(net).item()==36
    (rank_penalty(net)+overlap(net)).backward()
    assert all((p.grad is not None)<=('adapters' in k) for k,p in net.named_parameters()) and bank.up.grad.abs().sum()>0

def test_gradients_reach_the_encoder():
    "It is trained: the published one is frozen at random."
    net = wake(trajectory(**SMALL)(randomise(create('dit_tiny'))))
    x,t,cond = net.demo(6)
    net(x, torch.linspace(0, 1, 6, dtype=torch.float64), **cond).square().mean().backward()
    lost = [k for k,p in net.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not lost and all(p.grad is None for k,p in net.named_parameters() if 'adapters' not in k)

def test_instructions():
    "Prepared once and twice, the same; without one, and with guidance at w = 1, plain; padding does not count."
    net = wake(trajectory(**SMALL)(randomise(create('mlm_tiny'))))
    x,t,cond = net.demo()
    with torch.no_grad():
        y = net(x, t, **cond)
        once = net.prepare(**cond)
        assert torch.equal(net(x, t, **once), y) and torch.equal(net(x, t, **net.prepare(**once)), y)
        longer = torch.cat([cond['instr'], torch.zeros(2, 3, dtype=torch.long)], 1)
        assert diff(net(x, t, **{**cond, 'instr': longer}), y)<1e-5
        other = {**cond, 'instr': cond['instr'].flip(0)}
        assert diff(net(x, t, **other), y)>1e-4
        none = {k: v for k,v in cond.items() if k!='instr'}
        _,null = net.null(x, **{k: v for k,v in cond.items() if k!='keep'})
        assert diff(net(x, t, **{**none}), net(x, t, **{**none, 'instr': null['instr']}))<1e-6
        call = guided(1.)(net, cond)
        assert torch.equal(call(x, t), bind(net, cond)(x, t))
    with pytest.raises(ValueError, match='instr is tokens'): wake(trajectory(cond=8)(create('dit_tiny'))).prepare(instr=torch.ones(2, 3, dtype=torch.long))

def test_instructions_are_read_in_order():
    "The mean over the tokens, which know their places; one instruction does for a batch of several phases."
    torch.manual_seed(0)
    enc,ids = Instruct(9, 8).eval(),torch.tensor([[3, 5, 7, 2]])
    with torch.no_grad(): assert diff(enc(ids), enc(ids.flip(1)))>1e-3
    part = trajectory_part(torch.nn.Linear(1, 1), 16, ranks=(2, 3, 4), cond=5)
    g = gen()
    with torch.no_grad():
        for p in part.parameters(): p.normal_(std=.3, generator=g)
        h,t,c = torch.randn(3, 4, 16, generator=g),torch.tensor([.1, .9, .5]),torch.randn(1, 5, generator=g)
        assert diff(part.delta(h, t, c), part.delta(h, t, c.expand(3, -1)))<1e-5

def test_looking_for_the_width_changes_nothing():
    for on in (True, False): assert trajectory(**SMALL)(create('dit_tiny').train(on)).training is on

def two():
    net = randomise(create('dit_tiny'))
    for i,n in enumerate('ab'): net = wake(trajectory(**SMALL)(net, n), n, i, .3)
    return net
def test_router():
    "All for one is that one to the bit; equal shares are the mean; its gradient reaches it alone."
    net = router(['a', 'b'], 16)(two())
    gate = net.adapters['router'].net[3]
    net.eval()
    with torch.no_grad():
        for i,n in enumerate('ab'):
            gate.weight.zero_(); gate.bias.copy_(200.*torch.eye(2)[i])
            assert torch.equal(run(switch(net, 'router')), run(switch(net, n)))
        gate.bias.zero_()
        assert diff(run(switch(net, 'router')), run(switch(net, {'a': .5, 'b': .5})))<1e-5
    x,t,cond = net.demo()
    switch(net, 'router')(x, t, **cond).square().mean().backward()
    assert gate.bias.grad.abs().sum()>0 and {k.split('.')[1] for k,p in net.named_parameters() if p.grad is not None}=={'router'}
    with pytest.raises(ValueError, match="did you mean 'a'|no adapter is called 'c'"): router(['a', 'c'])(net, 'other')

def test_router_on_maps():
    "Channels are on axis 1: the weights are those of the mean over places."
    net = randomise(create('diffit_tiny'))
    for i,n in enumerate('ab'): net = wake(trajectory(ranks=(1, 2, 3))(net, n), n, i, .3)
    part = router(['a', 'b'], 16)(net).eval().adapters['router']
    n,axis = width(net)
    h = torch.randn(3, n, 4, 5, generator=gen())
    with torch.no_grad(): assert axis==1 and diff(part.weights(h), part.net(h.mean((2, 3))).softmax(-1))<1e-6
    assert run(switch(net, 'router')).isfinite().all()

def test_by_sample():
    net = two()
    x,t,cond = net.demo(3)
    with torch.no_grad():
        got = switch(net, ['b', None, 'a'])(x, t, **cond)
        for i,n in enumerate(['b', None, 'a']):
            one = switch(net, n)(x[i:i+1], t[i:i+1], **{k: v[i:i+1] for k,v in cond.items()})
            assert diff(one, got[i:i+1])<1e-5

def test_arithmetic():
    net = two()
    with torch.no_grad():
        off,a,both = (run(switch(net, o)) for o in (None, 'a', {'a': 1., 'b': -1.}))
    assert diff(both, off)>1e-3 and diff(a, both)>1e-3
    with pytest.raises(ValueError, match='is no sum of two'): combine(net, {'a': 1., 'b': 1.}, 'c')
    with pytest.raises(ValueError, match='is no change of weights'): merge(switch(net, 'a'))

@pytest.mark.parametrize('name', ['dit_tiny', 'diffit_tiny', 'mlm_tiny'])
def test_files(name, tmp_path):
    "The adapter alone, encoder included; onto the plain base, to the bit."
    net = wake(trajectory(**SMALL)(randomise(create(name))))
    save_adapter(net, tmp_path/'a')
    size,n = (tmp_path/'a'/'adapter.safetensors').stat().st_size,coverage(net, 'default').numbers
    assert n==sum(v.numel() for v in tensors(net, 'default').values()) and 0<size-4*n<8000
    got = load_adapter(randomise(create(name)), tmp_path/'a')
    assert torch.equal(run(got), run(net))

def test_together_with_lora(tmp_path):
    "Both on one network, each with its own file and switch."
    net = trajectory(**SMALL)(lora(rank=2)(randomise(create('dit_tiny')), 'low'), 'path')
    net = wake(net, 'path')
    for k,_,s in slots(net):
        if k: s['low'].B.data.normal_(std=.1, generator=gen(7))
    assert names(net)==['path', 'low']
    for n in ('path', 'low'): save_adapter(net, tmp_path/n, n)
    got = load_adapter(load_adapter(randomise(create('dit_tiny')), tmp_path/'low', 'low'), tmp_path/'path', 'path')
    use = {'path': 1., 'low': 1.}
    assert torch.equal(run(switch(got, use)), run(switch(net, use)))
    assert not torch.equal(run(switch(net, 'low')), run(switch(net, use)))

def test_copies_keep_their_instructions():
    net = wake(trajectory(**SMALL)(randomise(create('dit_tiny'))))
    other = copy.deepcopy(net)
    assert torch.equal(run(other), run(net)) and width(other)==(64, -1) and inner(other) is other.base

def test_it_learns():
    "An instruction decides which token a frozen, random network gives: all right after training, by chance before."
    torch.manual_seed(0)
    net = trajectory(dim=48, ranks=(4, 4, 4), scales=(1., 1., 1.), cond=16, vocab=6)(randomise(create('mlm_tiny', n=6)))
    g = gen()
    opt = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    frozen = {k: v.clone() for k,v in inner(net).state_dict().items()}
    def batch(n):
        y = torch.randint(1, 6, (n, 1), generator=g)
        return torch.full((n, 6), net.mask_id), torch.rand(n, generator=g, dtype=torch.float64), y, y[:,0]*7
    def right():
        x,t,instr,want = batch(64)
        with torch.no_grad(): return (net(x, t, instr=instr)[:,0].argmax(-1)==want).float().mean().item()
    before = right()
    for _ in range(120):
        x,t,instr,want = batch(16)
        loss = torch.nn.functional.cross_entropy(net(x, t, instr=instr)[:,0], want)
        opt.zero_grad(); loss.backward(); opt.step()
    assert before<.5 and right()>=.95
    assert all(torch.equal(v, frozen[k]) for k,v in inner(net).state_dict().items())

def test_errors():
    base = create('dit_tiny')
    with pytest.raises(ValueError, match='rank 100 does not fit a hidden state of width 64'): trajectory(ranks=(8, 8, 100))(base)
    with pytest.raises(ValueError, match='do not fit'): trajectory(ranks=(8, 8))(base)
    with pytest.raises(ValueError, match='do not fit'): trajectory(ranks=(2, 2, 2), bounds=(.6, .3))(base)
    with pytest.raises(ValueError, match='does not fit a hidden'): Bank(8, 9, 2)
    assert Instruct(5, 8)(torch.zeros(2, 3, dtype=torch.long)).abs().sum()==0

@pytest.mark.parametrize('backend', ['aot_eager', pytest.param('inductor', marks=pytest.mark.slow)])
def test_compiled_it_is_one_graph(backend):
    "No graph break, no compiling again at another time, the same outputs and gradients at every time; other adapters likewise. In a process of its own, where annotations are not checked."
    import os, subprocess, sys
    code = '''
import sys, torch
from torch._dynamo.testing import CompileCounterWithBackend
from adapted import create, diff, presets, randomise, wake
from diffnb.peft.trajectory import router, trajectory
backend = sys.argv[1]
SMALL = dict(ranks=(2, 3, 4), k=2, cond=8, vocab=12)
def both(net, times, grads=False):
    torch._dynamo.reset()
    count, (x, _, cond) = CompileCounterWithBackend(backend), net.demo(4)
    fast = torch.compile(net, backend=count, fullgraph=True)
    for t in times:
        found = []
        for f in (net, fast):
            net.zero_grad()
            with torch.set_grad_enabled(grads): y = f(x, t, **cond)
            if grads: y.square().mean().backward()
            found.append([y.detach(), *(torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in net.parameters() if grads and p.requires_grad)])
        a, b = found
        assert len(a)==len(b) and all(diff(p, q)<2e-5*max(1., p.abs().max().item()) for p,q in zip(a, b)), (type(net), t)
    assert count.frame_count==1, count.frame_count
mixed, one = [torch.tensor(o).double() for o in ([.1, .5, .9, 1/3], [.7, .7, .2, 0.])], [torch.tensor([o]).double() for o in (.1, 1/3, .5, 1.)]
for name in ('dit_tiny', 'mlm_tiny'): both(wake(trajectory(**SMALL)(randomise(create(name)))), one)
both(wake(trajectory(**SMALL)(randomise(create('dit_tiny')))), mixed, True)
net = randomise(create('dit_tiny'))
for n in 'ab': net = wake(trajectory(ranks=(1, 2, 3))(net, n), n)
both(router(list('ab'), hidden=8)(net).eval(), mixed)
for k in ('houlsby', 'prefix', 'bitfit'): both(wake(presets('adapter')[k]()(randomise(create('dit_tiny' if k!='houlsby' else 'mlm_tiny')))), one[:1])
'''
    here = os.path.dirname(__file__)
    subprocess.run([sys.executable, '-c', code, backend], check=True, cwd=here, env={**os.environ, 'DIFFNB_TYPECHECK': '0'})
