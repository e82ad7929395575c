"Mamba-2: three forms of one sum, the block against transformers, both directions against their dense matrices; in float64 and with random weights."
import math, warnings
import pytest, torch
import torch.nn.functional as F
from torch import nn
from diffnb.core import create
from diffnb.models.mamba2 import GroupNorm, Mixer, Quasi, attention, chunked, decay, fused, mamba2_tiny, memory, recurrence, use

F64 = torch.float64
def gen(seed=0): return torch.Generator().manual_seed(seed)
def normal(*s, seed=0, dtype=F64): return torch.randn(*s, generator=gen(seed), dtype=dtype)
def problem(b=2, n=37, h=4, p=3, g=2, s=5, seed=0, dtype=F64):
    x,dt,A,B,C = (normal(*o, seed=seed+i) for i,o in enumerate(((b,n,h,p), (b,n,h), (h,), (b,n,g,s), (b,n,g,s))))
    return tuple(o.to(dtype) for o in (x, F.softplus(dt), -A.exp(), B, C))
def diff(a, b): return (a-b).abs().max().item()
def rel(a, b): return ((a-b).abs().max()/b.abs().max()).item()
def randomised(net, std=.3, seed=0):
    r = gen(seed)
    for p in net.parameters(): p.data = std*torch.randn(p.shape, generator=r, dtype=p.dtype)
    return net.eval()

# --- 1: chunked = recurrence = matrix
@pytest.mark.parametrize('state', [False, True])
@pytest.mark.parametrize('g', [1, 2, 4])
@pytest.mark.parametrize('q', [1, 8, 16, 64, 128])
def test_chunked_is_the_recurrence(q, g, state):
    for n in (1, 5, 37, 64, 65):
        args = problem(n=n, g=g, seed=n)
        S = normal(2, 4, 3, 5, seed=99) if state else None
        want = recurrence(*args, S)
        assert diff(chunked(q)(*args, S), want)<1e-12, (n, q)
        assert diff(attention(*args, S), want)<1e-12, n

@pytest.mark.parametrize('state', [False, True])
@pytest.mark.parametrize('room', [1, 100, 1000])
def test_pieces(room, state):
    "A text that goes through in pieces, with gradients and without; D added."
    args,S,D = problem(n=37),normal(2, 4, 3, 5, seed=99) if state else None,normal(4, seed=98)
    want = recurrence(*args, S, D)
    assert diff(attention(*args, S, D), want)<1e-12 and diff(want-recurrence(*args, S), args[0]*D[:,None])<1e-12
    for grad in (False, True):
        with torch.set_grad_enabled(grad): assert diff(chunked(4, room)(*args, S, D), want)<1e-12

def test_by_hand():
    "One channel, one number of memory: y2 = C2 (e^{dt2 A} dt1 B1 x1 + dt2 B2 x2)."
    x,dt,B,C = (torch.tensor(o, dtype=F64).view(1, 2, 1, 1) for o in ((3., 5.), (.1, .2), (7., 11.), (13., 17.)))
    want = [13*.1*7*3, 17*(math.exp(-.2*2)*.1*7*3+.2*11*5)]
    for f in (recurrence, attention, chunked(1), chunked(2)):
        assert torch.allclose(f(x, dt[...,0], torch.tensor([-2.], dtype=F64), B, C).flatten(), torch.tensor(want, dtype=F64), rtol=1e-14)

@pytest.mark.parametrize('q', [8, 16, 64, 128])
def test_float32(q):
    args = problem(n=200, h=8, p=16, s=16, g=1)
    assert rel(chunked(q)(*(o.float() for o in args)).double(), recurrence(*args))<1e-5

def test_bfloat16_is_summed_in_float32():
    args = [o.bfloat16() for o in problem(n=40)]
    y = chunked(16)(*args)
    assert y.dtype==torch.float32 and rel(y.double(), recurrence(*(o.double() for o in args)))<1e-2

# --- 2: going on
@pytest.mark.parametrize('cut', [1, 16, 20, 36])
def test_memory_goes_on(cut):
    x,dt,A,B,C = problem()
    S0 = normal(2, 4, 3, 5, seed=9)
    whole = recurrence(x, dt, A, B, C, S0)
    S = memory(x[:,:cut], dt[:,:cut], A, B[:,:cut], S0)
    assert diff(chunked(8)(x[:,cut:], dt[:,cut:], A, B[:,cut:], C[:,cut:], S), whole[:,cut:])<1e-12
    assert diff(memory(x[:,cut:], dt[:,cut:], A, B[:,cut:], S), memory(x, dt, A, B, S0))<1e-12

@pytest.mark.parametrize('conv', [2, 4])
def test_token_by_token(conv):
    "A block that takes up its text again after each token gives what it gives for the whole."
    net,u = randomised(Mixer(16, head=8, state=6, groups=2, conv=conv).double()),normal(2, 11, 16)
    with torch.no_grad():
        past,out = None,[]
        for i in range(11):
            out.append(net(u[:,i:i+1], past=past))
            past = net.after(u[:,i:i+1], past)
        assert diff(torch.cat(out, 1), net(u))<1e-10

# --- 3: steps that break differences of running sums
@pytest.mark.parametrize('q', [16, 64, 128])
def test_adversarial_steps(q):
    x,dt,A,B,C = problem(1, 128, 2, 8, 1, 8)
    dt = torch.where(torch.arange(128)%32<16, 100., .001).to(F64)[None,:,None].expand(1, 128, 2).contiguous()
    y = chunked(q)(*(o.float() for o in (x, dt, A, B, C)))
    assert y.isfinite().all() and rel(y.double(), recurrence(x, dt, A, B, C))<1e-5
    a = (dt.float()*A.float()).mT.cumsum(-1)
    careless = (a[...,None]-a[...,None,:]).tril().exp().tril() # the guard: this way would fail
    y = torch.einsum('bhij,bij,bjhp->bihp', careless, C.float()[:,:,0]@B.float()[:,:,0].mT, x.float()*dt.float()[...,None])
    assert rel(y.double(), recurrence(x, dt, A, B, C))>1e-4

def test_huge_steps_are_finite_with_gradients():
    x,dt,A,B,C = (o.float().requires_grad_() for o in problem(1, 40, 2, 4, 1, 4))
    y = chunked(8)(x, dt*1e4, A, B, C)
    y.sum().backward()
    assert y.isfinite().all() and all(o.grad.isfinite().all() for o in (x, dt, A, B, C))

# --- 5: gradients
@pytest.mark.parametrize('state', [False, True])
def test_gradcheck(state):
    args = [o.requires_grad_() for o in problem(1, 7, 2, 2, 1, 3)]
    if state: args.append(normal(1, 2, 2, 3, seed=8).requires_grad_())
    assert torch.autograd.gradcheck(chunked(3), args) and torch.autograd.gradcheck(chunked(2, room=1), args)
    assert torch.autograd.gradcheck(lambda x, dt, A, B, C, *S: memory(x, dt, A, B, *S), args)

# --- 6: dense matrices, entry by entry
def dense(dt, A, B, C):
    "M_ij = C_i^T (prod_{j<k<=i} exp(dt_k A)) B_j dt_j of one head, by loops."
    n = len(dt)
    M = torch.zeros(n, n, dtype=F64)
    for i in range(n):
        for j in range(i+1): M[i,j] = (C[i]@B[j])*math.prod(math.exp(dt[k]*A) for k in range(j+1, i+1))*dt[j]
    return M

def test_dense_matrix():
    x,dt,A,B,C = problem(1, 12, 2, 3, 1, 4)
    y = chunked(5)(x, dt, A, B, C)
    for h in range(2): assert diff(dense(dt[0,:,h], A[h], B[0,:,0], C[0,:,0])@x[0,:,h], y[0,:,h])<1e-12

def test_hydra_is_its_quasiseparable_matrix():
    "The whole block with one head, from its parts: lower, upper, diagonal."
    net,u = randomised(Quasi(4, expand=2, head=8, state=3, conv=3).double()),normal(1, 9, 4)
    with torch.no_grad():
        z,xbc,dt = net.in_proj(u)[0].split([8, 8+12, 2], -1)
        conv = sum(net.conv.weight[:,0,k]*F.pad(xbc, (0, 0, 1, 1))[k:k+9] for k in range(3))+net.conv.bias
        x,B,C,Bb,Cb = F.silu(conv).split([8, 3, 3, 3, 3], -1)
        dt,A = F.softplus(dt+net.dt_bias),-net.A_log.exp().item()
        there,back = dense(dt[:,0], A, B, C),dense(dt[:,1].flip(0), A, Bb.flip(0), Cb.flip(0)).flip(0, 1)
        M = torch.diag(x@net.own.weight[0]+net.D)
        M[1:] += there[:-1]
        M[:-1] += back[1:]
        assert (M.tril(-1)!=0).any() and (M.triu(1)!=0).any()
        y = M@x
        y = y/(y.square().mean(-1, keepdim=True)+1e-5).sqrt()*net.norm.weight*F.silu(z)
        assert diff(net.out_proj(y), net(u)[0])<1e-12

def test_sum_of_both_directions():
    net,u = randomised(Mixer(8, ways=2, head=4, state=3).double()),normal(2, 9, 8)
    with torch.no_grad():
        z,xbc,dt = net.in_proj(u).split(net.sizes, -1)
        y = net.cores[0](xbc, dt)+net.cores[1](xbc.flip(1), dt.flip(1)).flip(1)
        assert diff(net(u), net.out_proj(net.norm(y*F.silu(z))))<1e-14

# --- 7: who depends on whom
def depends(net, n=9, d=8):
    "(i,j): does output i depend on input j?"
    u = normal(1, n, d)
    J = torch.autograd.functional.jacobian(lambda v: net(v)[0], u)
    return J.abs().amax((1, 2, 4))>0

def test_causality_and_full_dependence():
    one,two,hydra = (randomised(o.double()) for o in (Mixer(8, head=4, state=3), Mixer(8, ways=2, head=4, state=3), Quasi(8, head=4, state=3)))
    assert torch.equal(depends(one), torch.ones(9, 9).tril().bool())
    assert depends(two).all() and depends(hydra).all()

def test_reversal():
    "With equal cores, and with halves exchanged, a text from its end gives the result from its end."
    u,two = normal(2, 9, 8),randomised(Mixer(8, ways=2, head=4, state=3).double())
    assert diff(two(u.flip(1)), two(u).flip(1))>1e-3
    two.cores[1].load_state_dict(two.cores[0].state_dict())
    assert diff(two(u.flip(1)), two(u).flip(1))<1e-12
    hydra = randomised(Quasi(8, head=4, state=3).double())
    assert diff(hydra(u.flip(1)), hydra(u).flip(1))>1e-3
    with torch.no_grad(): # rows: z 16, x 16, B and C of 3, those of the other direction, dt of 4 and of the other
        for a,b,k in ((32, 38, 6), (44, 48, 4)): hydra.in_proj.weight[b:b+k] = hydra.in_proj.weight[a:a+k]
        for t in (hydra.conv.weight, hydra.conv.bias): t[22:28] = t[16:22]
        hydra.conv.weight.copy_(hydra.conv.weight+hydra.conv.weight.flip(-1))
    assert diff(hydra(u.flip(1)), hydra(u).flip(1))<1e-12

# --- 8: pads
@pytest.mark.parametrize('mixer', ['causal', 'both', 'quasi'])
@pytest.mark.parametrize('bias', [False, True])
def test_pads_never_matter(mixer, bias):
    "Lengths 5, 9 and 16 in one batch, pads of any content, at the right and at the left; float32 as in use."
    kw = dict(bias=True) if bias and mixer!='quasi' else {}
    net = randomised(mamba2_tiny(mixer=mixer, **kw), .2)
    g,t = gen(1),torch.rand(3, dtype=F64, generator=gen(2))
    texts = [torch.randint(48, (1, n), generator=g) for n in (5, 9, 16)]
    with torch.no_grad():
        alone = [net(o, t[i:i+1]) for i,o in enumerate(texts)]
        for left in (False, True):
            x,mask = torch.randint(48, (3, 16), generator=g),torch.zeros(3, 16, dtype=torch.bool)
            for i,o in enumerate(texts):
                at = slice(16-o.shape[1], 16) if left else slice(0, o.shape[1])
                x[i,at],mask[i,at] = o[0],True
            y = net(x, t, mask=mask)
            scale = max(o.abs().max() for o in alone)
            for i,o in enumerate(alone): assert diff(y[i][mask[i]], o[0])<1e-6*max(1, scale), (left, i)
            if not left and mixer!='causal': assert diff(net(x, t)[0,:5], alone[0][0])>1e-3 # without the mask they would

# --- 4: transformers
def theirs(**kw):
    transformers = pytest.importorskip('transformers')
    base = dict(hidden_size=64, num_heads=8, head_dim=16, state_size=16, n_groups=2, num_hidden_layers=3, chunk_size=16, vocab_size=50,
                pad_token_id=0, bos_token_id=0, eos_token_id=0)
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        net = transformers.Mamba2Model(transformers.Mamba2Config(**{**base, **kw})).eval()
        with torch.no_grad():
            for k,p in net.named_parameters(): # their fresh D and norms are ones, which hide exchanges
                if p.ndim==1: p.add_(.3*torch.randn(p.shape))
    return net

CASES = {'groups 2': {}, 'groups 1': dict(n_groups=1), 'groups 4': dict(n_groups=4), 'chunk does not divide': dict(chunk_size=8),
         'one chunk': dict(chunk_size=256), 'biases': dict(use_bias=True, use_conv_bias=False), 'expand 1, conv 3': dict(expand=1, num_heads=4, conv_kernel=3),
         'limits': dict(time_step_limit=(.01, .05)), 'eps': dict(layer_norm_epsilon=.1)}
@pytest.mark.parametrize('n', [1, 37, 48])
@pytest.mark.parametrize('name', CASES)
def test_equals_transformers(name, n):
    from diffnb.hub.layouts import load_state
    from diffnb.hub.text import mamba2_config
    them = theirs(**CASES[name])
    us = mamba2_config().ours(them.config.to_dict()).eval()
    load_state(us, them.state_dict(), 'Mamba2Model')
    x = torch.randint(50, (2, n), generator=gen(3))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter('ignore')
        want = them(x).last_hidden_state
        got = us.last(us.features(x, None).h)
    assert want.std()>.1 and diff(got, want)<1e-5*max(1, want.abs().max().item())

# --- the rest
@pytest.mark.parametrize('scan', [recurrence, attention, chunked(4), chunked(128)])
def test_use(scan):
    for mixer in ('both', 'quasi'):
        net = randomised(mamba2_tiny(mixer=mixer)).double()
        x,t,cond = net.demo(2)
        with torch.no_grad():
            want = net(x, t, **cond)
            assert diff(use(net, scan)(x, t, **cond), want)<1e-10*want.abs().max()
        assert all(m.scan is scan for m in net.modules() if hasattr(m, 'scan'))
    with pytest.raises(ValueError, match='has no SSD'): use(nn.Linear(1, 1), scan)

def test_kernels_are_asked_for_at_once():
    try: import mamba_ssm
    except ModuleNotFoundError:
        with pytest.raises(ModuleNotFoundError, match=r'diffnb\[gpu\]'): fused()

@pytest.mark.cuda
@pytest.mark.parametrize('state', [False, True])
def test_kernels_compute_the_same(state):
    args = [o.cuda() for o in problem(2, 300, 8, 64, 1, 64, dtype=torch.float32)]
    S = normal(2, 8, 64, 64, seed=9, dtype=torch.float32).cuda() if state else None
    D = normal(8, seed=7, dtype=torch.float32).cuda()
    assert rel(fused()(*args, S, D), chunked()(*args, S, D))<5e-3 # their products are of TF32

@pytest.mark.parametrize('kw, says', [(dict(head=24), 'heads of 24'), (dict(head=16, groups=3), '3 groups'), (dict(head=24, mixer='quasi'), 'heads of 24'),
    (dict(mixer='bth'), "did you mean 'both'")])
def test_sizes_that_do_not_fit(kw, says):
    with pytest.raises(ValueError, match=says): mamba2_tiny(**kw)

def test_no_tokens():
    with pytest.raises(ValueError, match='at least 1'): mamba2_tiny()(torch.zeros(2, 0, dtype=torch.long), torch.zeros(1))

def test_a_past_needs_one_direction():
    with pytest.raises(ValueError, match='looks both ways'): Mixer(8, ways=2, head=4, state=3).after(torch.zeros(1, 2, 8))

def test_fresh_weights():
    "Steps between 0.001 and 0.1, A between -16 and -1, time without effect."
    net = mamba2_tiny(depth=4, head=2)
    core = [c for l in net.layers for c in l.layer.cores]
    dt = torch.cat([F.softplus(c.dt_bias) for c in core])
    A = torch.cat([c.A_log.exp() for c in core])
    assert .00099<dt.min()<.004 and .03<dt.max()<.101 and 1<=A.min()<2.5 and 12<A.max()<=16
    x,t,cond = net.demo(2)
    assert torch.equal(net(x, t, **cond), net(x, t+.3, **cond))

def test_counts():
    "130M as published; the parts of a block by hand."
    with torch.device('meta'): n = sum(p.numel() for p in create('mamba2_130m').parameters())
    assert n==128_989_632
    d,e,s,h,k = 768,1536,128,24,4
    block = d*(2*e+2*s+h)+(e+2*s)*(k+1)+3*h+e+e*d+d
    assert n==50_288*d+24*block+d

def test_decay_shapes():
    a = -normal(3, 2, 6).abs()
    L = decay(a)
    assert L.shape==(3, 2, 6, 6) and torch.equal(L.diagonal(dim1=-2, dim2=-1), torch.ones_like(a)) and not L.triu(1).any()
    assert torch.allclose(L[...,5,2], a[...,3:].sum(-1).exp(), rtol=1e-14)

def test_group_norm():
    x,m = normal(2, 3, 12),GroupNorm(12, 3).double()
    m.weight.data = normal(12, seed=2)
    want = torch.cat([o/(o.square().mean(-1, keepdim=True)+1e-5).sqrt() for o in x.chunk(3, -1)], -1)*m.weight
    assert diff(m(x), want)<1e-14
