"DiT, SiT and experts against their equations and published counts, in float64 and with random weights: fresh ones hide faults behind closed gates."
import re
import pytest, torch
from torch.utils.flop_counter import FlopCounterMode
from diffnb.core import create, mean_loss, presets
from diffnb.models.dit import MoE, Router, dit, dit_moe, dit_moe_tiny, dit_tiny, unevenness
from diffnb.models.layers import sinusoid
from diffnb.process.gaussian import Gaussian
from diffnb.rng import Rng
from diffnb.samplers import ddim, heun, sample

F64 = torch.float64
def gen(seed=0): return torch.Generator().manual_seed(seed)
def normal(*s, seed=0): return torch.randn(*s, generator=gen(seed), dtype=F64)
def randomised(net, seed=0, dtype=F64):
    "Weights of a size that keeps activations near 1, so that no part is lost beside another."
    g = gen(seed)
    for p in net.parameters(): p.data = (p[0].numel()**-.5 if p.ndim>1 else .2)*torch.randn(p.shape, generator=g, dtype=F64).to(dtype)
    return net.to(dtype).eval()
def diff(a, b): return (a-b).abs().max().item()
def small(**kw): return randomised(dit(2, 32, 4, **{**dict(size=8, classes=5), **kw}))

# --- published sizes (spec 2, check 1; GMAC of the papers are multiply-accumulates)
SHEET = dict( # parameters without places, GMAC measured on the original
    dit_s_8=(33_142_016, .36), dit_s_4=(32_920_448, 1.41), dit_s_2=(32_865_056, 6.06), dit_b_8=(130_869_248, 1.42),
    dit_b_4=(130_426_496, 5.57), dit_b_2=(130_315_808, 23.01), dit_l_8=(458_578_432, 5.01), dit_l_4=(457_988_224, 19.70),
    dit_l_2=(457_840_672, 80.70), dit_xl_8=(675_664_640, 7.39), dit_xl_4=(675_000_704, 29.04), dit_xl_2=(674_834_720, 118.62),
    dit_xl_2_512=(674_834_720, 524.54))
PLACES = dict(dit_s_8=6_144, dit_s_2=98_304, dit_b_4=49_152, dit_xl_2=294_912, dit_xl_2_512=1_179_648) # of the sheet: with minus without

@pytest.mark.parametrize('name', SHEET)
def test_published(name):
    params, gmac = SHEET[name]
    with torch.device('meta'):
        net = create(name)
        x, t = torch.empty(1, net.ch, net.size, net.size), torch.empty(1)
        with FlopCounterMode(display=False) as f: y = net(x, t)
    assert sum(p.numel() for p in net.parameters())==params
    assert abs(f.get_total_flops()/2e9-gmac)<=max(.005*gmac, .005) # the sheet has two places
    assert net.pos.numel()==PLACES.get(name, net.pos.numel()) and y.shape==(1, 8, *x.shape[2:])
    assert net.preset==dict(kind='denoiser', name=name, kw={})

def test_every_preset_is_on_the_sheet():
    ours = {n for n in presets('denoiser') if n.startswith('dit_') and 'moe' not in n and not n.endswith('tiny')}
    assert ours==set(SHEET)

@pytest.mark.parametrize('size', ['s_2', 'b_2', 'l_2', 'xl_2'])
def test_sit_is_the_same_network(size):
    with torch.device('meta'): a, b = create(f'dit_{size}'), create(f'sit_{size}')
    assert {k: v.shape for k,v in a.state_dict().items()}=={k: v.shape for k,v in b.state_dict().items()}
    assert b.sit and not a.sit and [o.attn.heads for o in a.blocks]==[o.attn.heads for o in b.blocks]

@pytest.mark.parametrize('kind,depth,dim,heads', [('s', 12, 384, 6), ('b', 12, 768, 12), ('l', 24, 1024, 16), ('xl', 28, 1152, 16)])
def test_table(kind, depth, dim, heads):
    "Heads change neither parameters nor work, so no count tells them."
    for p in (2, 4, 8):
        with torch.device('meta'): net = create(f'dit_{kind}_{p}')
        assert (len(net.blocks), net.stem.out_channels, {b.attn.heads for b in net.blocks}, net.patch, net.size)==(depth, dim, {heads}, p, 32)

def test_presets_can_be_changed():
    net = create('dit_s_8', size=16, ch=3, classes=0, sigma=False, scale=1000.)
    assert (net.size, net.ch, net.label, net.out.out_features, net.time.scale)==(16, 3, None, 8*8*3, 1000.)
    with pytest.raises(TypeError, match="no argument 'clases'.*'classes'"): create('dit_s_8', clases=3)

# --- equations
def by_hand(net, x, t, y):
    "The whole network from its equations, without any layer of ours."
    W = dict(net.named_parameters())
    lin = lambda o, n: o@W[f'{n}.weight'].T+W[f'{n}.bias']
    silu = lambda o: o*torch.sigmoid(o)
    ln = lambda o: (o-o.mean(-1, keepdim=True))/(o.var(-1, correction=0, keepdim=True)+1e-6).sqrt()
    gelu = lambda o: o/2*(1+torch.tanh((2/torch.pi)**.5*(o+.044715*o**3)))
    d, p, h = W['stem.weight'].shape[0], net.patch, net.blocks[0].attn.heads
    a = t[:,None].double()*torch.exp(-torch.arange(128, dtype=F64)/128*torch.log(torch.tensor(1e4, dtype=F64)))
    c = lin(silu(lin(torch.cat([a.cos(), a.sin()], -1), 'time.mlp.0')), 'time.mlp.2')+W['label.table.weight'][y]
    x = torch.einsum('bcipjq,dcpq->bijd', x.unflatten(3, (-1, p)).unflatten(2, (-1, p)), W['stem.weight']).flatten(1, 2)+W['stem.bias']+net.pos
    for i in range(len(net.blocks)):
        b = f'blocks.{i}'
        s1, k1, g1, s2, k2, g2 = lin(silu(c), f'{b}.ada.1')[:,None].chunk(6, -1)
        q, k, v = lin(ln(x)*(1+k1)+s1, f'{b}.attn.qkv').unflatten(-1, (3, h, -1)).permute(2, 0, 3, 1, 4)
        o = (torch.softmax(q@k.mT/(d//h)**.5, -1)@v).transpose(1, 2).flatten(2)
        x = x+g1*lin(o, f'{b}.attn.proj')
        x = x+g2*lin(gelu(lin(ln(x)*(1+k2)+s2, f'{b}.mlp.0')), f'{b}.mlp.2')
    s, k = lin(silu(c), 'last.ada.1')[:,None].chunk(2, -1)
    x = lin(ln(x)*(1+k)+s, 'out').view(len(x), net.size//p, net.size//p, p, p, -1)
    return torch.einsum('bijpqc->bcipjq', x).flatten(4).flatten(2, 3)

@pytest.mark.parametrize('patch', [1, 2, 4])
def test_equations(patch):
    net = small(patch=patch)
    x, t, y = normal(3, 4, 8, 8), torch.tensor([17., 803., 0.], dtype=F64), torch.tensor([0, 4, 5])
    want = by_hand(net, x, t, y)
    assert want.std()>.1 and diff(net(x, t, y=y), want)<1e-12

def test_start(): # check 4
    "Fresh blocks are the identity to the bit; the network gives exactly 0; its linear layers are Xavier, its biases 0."
    net = dit(2, 32, 4, size=8, classes=5)
    x, c = torch.randn(2, 16, 32, generator=gen()), torch.randn(2, 32, generator=gen(1))
    for b in net.blocks: assert torch.equal(b(x, c), x)
    assert (net(*net.demo(2)[:2])==0).all()
    bound = {'stem.weight': (6/(32+16))**.5, 'blocks.0.attn.qkv.weight': (6/(32+96))**.5, 'blocks.1.mlp.2.weight': (6/(128+32))**.5}
    for n,p in net.named_parameters():
        if n in bound: assert .9*bound[n]<p.abs().max()<=bound[n]
        if n.endswith('bias') or 'ada' in n or n.startswith('out'): assert (p==0).all(), n
        if n.startswith(('time', 'label')) and p.ndim>1: assert .015<p.std()<.025

# --- the contract
def test_one_row_for_all():
    "Time and label that all samples share give one row of modulations, and the same result."
    net = small()
    x, one, y = normal(3, 4, 8, 8), torch.tensor([.3], dtype=F64), torch.full((3,), 2)
    ready = net.prepare(y=y)
    rows = []
    hooks = [m.register_forward_hook(lambda m,a,o: rows.append(len(o))) for m in (net.time, net.blocks[0].ada, net.blocks[1].ada, net.last.ada)]
    got = net(x, one, **ready)
    assert rows==[1]*4 and ready['y'].tolist()==[2]
    for want in (net(x, one.expand(3), y=y), net(x, one, y=y)): assert diff(got, want)<1e-12
    rows.clear()
    net(x, one, **net.prepare(**net.null(x, y=torch.tensor([0, 1, 2]))[1])) # the branch without labels
    assert rows==[1]*4
    rows.clear()
    net(x, one, **net.prepare(y=torch.tensor([0, 1, 2])))
    assert rows==[1, 3, 3, 3] # time once; the rest for each label
    for h in hooks: h.remove()
    assert torch.equal(net.prepare(y=torch.tensor([0, 1]))['y'], torch.tensor([0, 1])) and net.prepare(**ready)['y'].tolist()==[2]

def test_labels():
    net = small()
    x, t = normal(2, 4, 8, 8), torch.tensor([.5], dtype=F64)
    null = torch.tensor([5, 5])
    assert diff(net(x, t), net(x, t, y=null))<1e-12 and torch.equal(net.null(x, y=torch.tensor([1, 2]))[1]['y'], null)
    assert diff(net(x, t, y=torch.tensor([1, 2])), net(x, t))>1e-2
    for bad in (torch.tensor([6, 0]), torch.tensor([-1, 0]), torch.tensor([.5, 0])):
        with pytest.raises(ValueError, match='labels must'): net.prepare(y=bad)
    plain = small(classes=0)
    assert plain.null(x)[1]=={'y': None} and plain.demo(2)[2]=={}
    with pytest.raises(ValueError, match='no labels'): plain(x, t, y=null)

def test_token(): # spec 1, check 10
    net = small(classes=1000)
    t, y = torch.tensor([17.], dtype=F64), torch.tensor([3])
    h = sinusoid(t, 256)@net.time.mlp[0].weight.T+net.time.mlp[0].bias
    want = (h*h.sigmoid())@net.time.mlp[2].weight.T+net.time.mlp[2].bias+net.label.table.weight[3]
    assert diff(net.token(t, y), want)<1e-12
    assert net.label.null==1000 and torch.equal(net.token(t), net.token(t, torch.tensor([1000])))

def test_wrong_input():
    net = small()
    for s in ((1, 3, 8, 8), (1, 4, 8, 16), (1, 4, 16, 16)):
        with pytest.raises(ValueError, match=r'made for \(4, 8, 8\)'): net(normal(*s), torch.rand(1))
    with pytest.raises(ValueError, match='patches of 3 do not tile'): dit(1, 32, 4, patch=3, size=8)
    with pytest.raises(ValueError, match='5 heads'): dit(1, 32, 5)

@pytest.mark.parametrize('name', ['dit_tiny', 'dit_moe_tiny'])
def test_half_precision(name):
    "bfloat16, and mixed precision with float32 weights, stay near float32."
    net = randomised(create(name), dtype=torch.float32)
    x, t, cond = net.demo(2)
    want = net(x, t, **cond)
    with torch.autocast('cpu', torch.bfloat16): mixed = net(x, t, **cond)
    pure = net.bfloat16()(x.bfloat16(), t, **cond)
    assert mixed.isfinite().all() and pure.dtype==torch.bfloat16 and torch.corrcoef(torch.stack([want.flatten(), mixed.flatten().float()]))[0,1]>.99
    assert torch.corrcoef(torch.stack([want.flatten(), pure.flatten().float()]))[0,1]>.98

def test_without_gradients_is_the_same():
    net = small()
    x, t, cond = net.demo(2)
    with torch.no_grad(): quick = net(x.double(), t, **cond)
    with torch.inference_mode(): quickest = net(x.double(), t, **cond)
    assert torch.equal(quick, net(x.double(), t, **cond)) and torch.equal(quickest, quick)

# --- SiT (spec 2.4, check 7)
def test_sit_speaks_our_language():
    raw, sit = small(), small(sit=True)
    sit.load_state_dict(raw.state_dict())
    x, y = normal(2, 4, 8, 8), torch.tensor([1, 2])
    for t in (0., .3, 1.):
        t = torch.tensor([t], dtype=F64)
        assert diff(sit(x, t, y=y), -raw(x, 1-t, y=y)[:,:4])<1e-12

def perfect(s):
    "SiT's network for data N(0, s^2), exact in its own convention: x = t data + (1-t) noise, the target is data minus noise."
    return lambda x, t: x*(t*s**2-(1-t))/((t*s)**2+(1-t)**2)

@pytest.mark.parametrize('s', [.5, 2.])
def test_sit_samples(s):
    "Read as `sit` reads it and walked by our processes, the exact network turns noise into data of standard deviation s; Heun four times better for twice the steps."
    def called(x, net_t): return -perfect(s)(x, 1-net_t) # as `test_sit_speaks_our_language` says
    p, x = Gaussian('straight', 'flow'), torch.linspace(-3, 3, 13, dtype=F64)[:,None]
    err = [diff([*sample(called, p, x.shape, steps=n, step=heun(), x=x, dtype=F64)][-1], s*x) for n in (20, 40, 80)]
    assert err[1]<err[0]/3 and err[2]<err[1]/3 and err[2]<2e-2*s

def test_sit_training_target():
    "The loss of our rectified flow on a `sit` network is SiT's: its output against data minus noise, at its time."
    raw, sit = small(), small(sit=True)
    sit.load_state_dict(raw.state_dict())
    p, x0, t = Gaussian('straight', 'flow'), normal(3, 4, 8, 8), torch.tensor([.2, .5, .9], dtype=F64)
    seen = {}
    def call(x, net_t): seen.update(x=x); return sit(x, net_t)
    got = p.loss(call, x0, t, rng=Rng(0))
    eps = (seen['x']-(1-t)[:,None,None,None]*x0)/t[:,None,None,None]
    want = (raw(seen['x'], 1-t)[:,:4]-(x0-eps))**2
    assert (got.value-want).abs().max()<1e-5*want.max()

def test_samplers_take_it():
    net = randomised(dit_tiny(), dtype=torch.float32)
    for p in (Gaussian('straight', 'flow'), Gaussian('linear_beta', 'eps')):
        *_, x = sample(net, p, (2, 4, 16, 16), steps=3, step=ddim(), cond=dict(y=torch.tensor([1, 2])), w=2.)
        assert x.isfinite().all() and x.std()>0

# --- experts (spec 6)
def route_by_hand(s, k, groups, top):
    "Token by token: the two best of a group are its worth; the best groups take part."
    out = []
    for row in s.flatten(0, -2).tolist():
        n = len(row)//groups
        worth = [sum(sorted(row[j*n:(j+1)*n])[-2:]) for j in range(groups)]
        alive = sorted(range(groups), key=lambda j: -worth[j])[:top]
        best = sorted((e for j in alive for e in range(j*n, (j+1)*n)), key=lambda e: -row[e])[:k]
        out.append(best)
    return out

@pytest.mark.parametrize('experts,k,groups,top', [(8, 2, 1, 1), (8, 3, 4, 2), (12, 4, 3, 2), (16, 8, 8, 4), (6, 1, 6, 1), (256, 8, 8, 4)])
def test_router(experts, k, groups, top):
    m = randomised(Router(32, experts, k, groups, top))
    x = normal(2, 40, 32)
    w, i, s = m(x)
    assert diff(s, torch.sigmoid(x@m.gate.weight.T))<1e-12
    assert i.flatten(0, 1).tolist()==route_by_hand(s, k, groups, top)
    assert diff(w.sum(-1), torch.ones(2, 40, dtype=F64))<1e-12 and (w>0).all() # check: sums to 1 when normalised
    assert diff(w, s.gather(-1, i)/s.gather(-1, i).sum(-1, keepdim=True))<1e-12
    m.norm, m.scale = False, 2.5
    assert diff(m(x)[0], 2.5*s.gather(-1, i))<1e-12
    m.norm = True
    assert diff(m(x)[0].sum(-1), torch.full((2, 40), 2.5, dtype=F64))<1e-12

def test_groups_matter():
    "Without the limit other experts are chosen for some tokens: the limit is not idle."
    x = normal(1, 200, 32)
    limited, free = randomised(Router(32, 16, 4, 8, 2)), randomised(Router(32, 16, 4))
    a, b = limited(x)[1], free(x)[1]
    assert (a//2).sort(-1).values.diff(dim=-1).ne(0).sum(-1).max()<2 and (a!=b).any(-1).float().mean()>.5

@pytest.mark.parametrize('kw,words', [(dict(experts=8, k=3, groups=3), 'equal groups'), (dict(experts=8, k=5, groups=4, top=2), 'cannot be chosen'),
                                      (dict(experts=8, k=0), 'cannot be chosen'), (dict(experts=8, k=1, groups=2, top=3), 'cannot be chosen')])
def test_router_refuses(kw, words):
    with pytest.raises(ValueError, match=words): Router(16, **kw)

@pytest.mark.parametrize('shared', [0, 2])
def test_experts_by_hand(shared):
    "Token by token: the weighted sum of the chosen experts, and the shared ones."
    m = randomised(MoE(16, 24, experts=6, k=2, shared=shared, groups=3, top=2, scale=1.5))
    x = normal(2, 9, 16)
    w, i, _ = m.router(x)
    want = torch.stack([sum(a*m.experts[e](v) for a,e in zip(ws, es)) for v,ws,es in zip(x.flatten(0, 1), w.flatten(0, 1), i.flatten(0, 1).tolist())])
    if shared: want = want+m.shared(x.flatten(0, 1))
    assert diff(m(x).flatten(0, 1), want)<1e-12

@pytest.mark.parametrize('dtype', [torch.float32, F64])
def test_one_expert_is_dense(dtype):
    "One expert, used by all with weight 1: the dense network, bit for bit, with gradients and without."
    dense = randomised(dit(2, 32, 4, size=8, classes=5), dtype=dtype)
    one = dit_moe(2, 32, 4, experts=1, k=1, shared=0, groups=1, top=1, gain=1., size=8, classes=5).to(dtype).eval()
    copied = {re.sub(r'^(blocks\.\d+\.mlp)', r'\1.experts.0', n): v for n,v in dense.state_dict().items()}
    assert one.load_state_dict(copied, strict=False).missing_keys==[f'blocks.{i}.mlp.router.gate.weight' for i in (0, 1)]
    x, t, cond = dense.demo(3)
    x = x.to(dtype)
    assert torch.equal(one(x, t, **cond), dense(x, t, **cond))
    with torch.no_grad(): assert torch.equal(one(x, t, **cond), dense(x, t, **cond))

def test_no_expert_chosen():
    "An expert that nobody wants gives nothing, and its gradient is zero, not missing."
    m = randomised(MoE(16, 24, experts=4, k=1, norm=False))
    m.router.gate.weight.data[2] = -1e3*m.router.gate.weight.data[0].sign()
    x = normal(1, 5, 16).abs()*m.router.gate.weight.data[0].sign()
    m(x).sum().backward()
    assert all(p.grad is not None and (p.grad==0).all() for p in m.experts[2].parameters()) and m.router.gate.weight.grad.any()

def test_unevenness():
    e, k, n = 4, 2, 8
    even = torch.tensor([[[0, 1], [2, 3]]*4])
    flat = torch.full((1, n, e), .5, dtype=F64)
    assert diff(unevenness(flat, even), torch.ones(1, dtype=F64))<1e-12
    one = flat.clone(); one[...,2:] = 1e-9
    assert diff(unevenness(one, torch.tensor([[[0, 1]]*n])), torch.full((1,), e/k, dtype=F64))<1e-6 # all want the same two
    s = normal(3, n, e).sigmoid()
    i = s.topk(k).indices
    f = torch.stack([(i==j).any(-1).double().mean(1) for j in range(e)], -1)*e/k
    assert diff(unevenness(s, i), (f*(s/s.sum(-1, keepdim=True)).mean(1)).sum(-1))<1e-12
    assert diff(unevenness(s, i)[1:], unevenness(s[1:], i[1:]))==0 # each sample by itself

def test_own_loss():
    "In training each pass leaves a number for each sample, which is handed out once; in evaluation, and without experts, there is none."
    net = randomised(dit_moe_tiny(balance=.5)).train()
    x, t, cond = net.demo(3)
    x = x.double()
    assert net.own_loss() is None
    net(x, t, **cond)
    parts = [b.mlp.uneven for b in net.blocks]
    own = net.own_loss()
    assert own.shape==(3,) and diff(own, .5*(parts[0]+parts[1]))<1e-12 and net.own_loss() is None
    net(x[1:], t[1:], y=cond['y'][1:])
    assert diff(net.own_loss(), own[1:])<1e-12 # whatever the batch
    own.sum().backward()
    assert all(b.mlp.router.gate.weight.grad.any() for b in net.blocks) and net.out.weight.grad is None
    net.eval()(x, t, **cond)
    assert net.own_loss() is None
    plain = dit_tiny().train(); plain(*plain.demo(2)[:2])
    assert plain.own_loss() is None

def test_own_loss_evens_out():
    "Following its gradient alone, the use of experts becomes even."
    net = randomised(dit_moe_tiny(experts=8, balance=1.), dtype=torch.float32).train()
    x, t, cond = net.demo(8)
    opt = torch.optim.Adam([b.mlp.router.gate.weight for b in net.blocks], lr=.02)
    seen = []
    for _ in range(30):
        net(x, t, **cond)
        own = net.own_loss().mean()
        opt.zero_grad(); own.backward(); opt.step()
        seen.append(own.item())
    assert seen[0]>2.05 and seen[-1]<2.02 # two blocks: 2 is even

def test_own_loss_with_checkpointing():
    "Activations that are computed again leave the same gradient."
    from torch.utils.checkpoint import checkpoint
    grads = []
    for again in (False, True):
        net = randomised(dit_moe_tiny(balance=.5)).train()
        if again:
            for b in net.blocks: b.forward = (lambda f: lambda *a: checkpoint(f, *a, use_reentrant=False))(b.forward)
        x, t, cond = net.demo(3)
        y = net(x.double(), t, **cond)
        (y.square().mean()+net.own_loss().mean()).backward()
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert diff(*grads)<1e-12

def test_tiny_is_tiny():
    for f in (dit_tiny, dit_moe_tiny): assert sum(p.numel() for p in f().parameters())<200_000

def test_trains_with_the_process():
    "A few steps through the process, with what the network adds by itself: the loss falls."
    torch.manual_seed(0)
    net, p = dit_moe_tiny(ch=1, classes=0), Gaussian('straight', 'flow')
    opt, seen = torch.optim.Adam(net.parameters(), 3e-3), []
    x0 = torch.linspace(-1, 1, 16).expand(16, 1, 16, 16).contiguous()
    for i in range(25):
        rng = Rng(0, 'train', step=i)
        loss = p.loss(net, x0, rng.at('t').uniform(16), rng=rng)
        loss = mean_loss(loss._replace(value=loss.value+net.own_loss()[:,None,None,None]))
        opt.zero_grad(); loss.backward(); opt.step()
        seen.append(loss.item())
    assert sum(seen[-5:])<.7*sum(seen[:5])
