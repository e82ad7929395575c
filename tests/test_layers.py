"Layers against their equations, PyTorch's own layers, and their limits, in float64."
import pytest, torch
import torch.nn.functional as F
from torch import nn
from diffnb.models.layers import (MLP, Attention, LabelEmbed, RelBias, TimeEmbed, attend, modulate, offsets, patchify, positions_2d, sinusoid,
                                  unpatchify, unwindows, windows)

def gen(seed=0): return torch.Generator().manual_seed(seed)
def normal(*s, seed=0): return torch.randn(*s, generator=gen(seed), dtype=torch.float64)

def test_sinusoid_values():
    "Cosines first, frequencies exp(-ln(10000) i/half)."
    t = torch.tensor([0., 17., 999.], dtype=torch.float64)
    e = sinusoid(t, 256)
    for i in (0, 1, 64, 127):
        w = 10_000**(-i/128)
        assert torch.allclose(e[:,i], (t*w).cos(), atol=1e-12) and torch.allclose(e[:,128+i], (t*w).sin(), atol=1e-12)
    assert torch.equal(sinusoid(t/1000, 256, scale=1000.).round(decimals=9), e.round(decimals=9))

def test_sinusoid_keeps_the_precision_of_t():
    "Two neighbouring float64 times of a fine grid differ; through float32 they would be the same."
    t = torch.tensor([.7, .7+1e-9], dtype=torch.float64)
    e = sinusoid(t, 64, scale=1000.)
    assert e.dtype==torch.float64 and (e[0]-e[1]).abs().max()>1e-7

def test_sinusoid_per_position(): assert sinusoid(torch.rand(3, 5, dtype=torch.float64), 16).shape==(3, 5, 16)

def test_odd_dim():
    with pytest.raises(ValueError, match='even'): sinusoid(torch.rand(2), 7)

def test_time_embed():
    "Spec: MLP(sin-cos(t)) with swish; float64 time into a float32 network."
    m = TimeEmbed(32, std=.3)
    t = torch.tensor([17.], dtype=torch.float64)
    l0,l2 = m.mlp[0],m.mlp[2]
    h = sinusoid(t, 256).float()@l0.weight.T+l0.bias
    assert torch.allclose(m(t), (h*h.sigmoid())@l2.weight.T+l2.bias, atol=1e-6)
    assert m(t).dtype==torch.float32 and m.double()(t).dtype==torch.float64

def test_labels():
    m = LabelEmbed(10, 4)
    y = torch.tensor([0, 9, 10])
    assert torch.equal(m(y), m.table.weight[y])
    assert torch.equal(m(None), m.table.weight[10:]) and m.table.weight.shape==(11, 4)
    m.check(None); m.check(y); m.check(y[:0])
    for bad in (torch.tensor([11]), torch.tensor([-1]), torch.tensor([1.]), torch.tensor([[1]])):
        with pytest.raises(ValueError, match='labels must'): m.check(bad)

@pytest.mark.parametrize('heads', [1, 2, 4])
def test_attend_equals_its_equation(heads):
    q,k,v,B = normal(2, 5, 8), normal(2, 7, 8, seed=1), normal(2, 7, 8, seed=2), normal(heads, 5, 7, seed=3)
    d = 8//heads
    want = torch.cat([torch.softmax(q[...,i*d:(i+1)*d]@k[...,i*d:(i+1)*d].mT/d**.5+B[i], -1)@v[...,i*d:(i+1)*d] for i in range(heads)], -1)
    assert (attend(q, k, v, heads, B)-want).abs().max()<1e-12

def test_mlp():
    "Its equation, with and without gradients; what it is given stays as it was."
    m = MLP(8, 20).double()
    x = normal(2, 3, 8)
    before, h = x.clone(), F.linear(x, m[0].weight, m[0].bias)
    gelu = h/2*(1+torch.tanh((2/torch.pi)**.5*(h+.044715*h**3)))
    want = F.linear(gelu, m[2].weight, m[2].bias)
    assert (m(x)-want).abs().max()<1e-12
    with torch.no_grad(): assert torch.equal(m(x), m(x)) and (m(x)-want).abs().max()<1e-12
    assert torch.equal(x, before) and list(m.state_dict())==['0.weight', '0.bias', '2.weight', '2.bias']

def test_mlp_makes_its_hidden_layer_once():
    "The largest tensor of a block: without gradients there is one of it, with them two."
    from torch.utils._python_dispatch import TorchDispatchMode
    class Large(TorchDispatchMode):
        def __init__(self): super().__init__(); self.seen = set()
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            if torch.is_tensor(out) and out.numel()==600_000: self.seen.add(out.untyped_storage().data_ptr())
            return out
    m, x, made = MLP(4, 1000), torch.randn(2, 300, 4, generator=gen()), []
    for grad in (False, True):
        with torch.set_grad_enabled(grad), Large() as mode: y = m(x)
        made.append(len(mode.seen))
    assert y.requires_grad and made==[1, 2]

@pytest.mark.parametrize('b', [1, 3])
def test_modulate(b):
    x, shift, scale = normal(3, 5, 8), normal(b, 1, 8, seed=1), normal(b, 1, 8, seed=2)
    ln = (x-x.mean(-1, keepdim=True))/(x.var(-1, correction=0, keepdim=True)+1e-6).sqrt()
    assert (modulate(x, shift, scale)-(ln*(1+scale)+shift)).abs().max()<1e-12
    half = modulate(x.float(), shift.bfloat16(), scale.bfloat16()) # as mixed precision has it
    assert half.dtype==torch.float32 and (half-modulate(x, shift, scale)).abs().max()<.05

@pytest.mark.parametrize('side,dim', [(3, 8), (16, 1152)])
def test_positions_2d(side, dim):
    "First half of the channels the column, second half the row; sine before cosine."
    p, q = positions_2d(side, dim).view(side, side, 4, dim//4), dim//4
    assert p.dtype==torch.float32
    for k in {0, 1, q-1}:
        w = 10_000**(-4*k/dim)
        for i,j in ((0, 0), (1, 2), (side-1, side-2)):
            want = torch.tensor([j*w, j*w+torch.pi/2, i*w, i*w+torch.pi/2], dtype=torch.float64).sin()
            assert (p[i,j,:,k]-want).abs().max()<1e-6
    with pytest.raises(ValueError, match='4 divides'): positions_2d(side, 6)

def test_attend_leading_axes():
    "More batch axes are the same as more batch."
    q,k,v = (normal(2, 3, 5, 8, seed=i) for i in range(3))
    got = attend(q, k, v, 2)
    assert (got.flatten(0, 1)-attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), 2)).abs().max()<1e-12

def test_attend_bool_mask():
    "Positions that are masked out do not matter."
    q,k,v = (normal(2, 5, 8, seed=i) for i in range(3))
    see = torch.tensor([1, 1, 1, 0, 0], dtype=torch.bool)
    want = attend(q, k[:,:3], v[:,:3], 2)
    assert (attend(q, k, v, 2, see[None,None,None])-want).abs().max()<1e-12

def test_attention_equals_torch():
    m,ref = Attention(16, 4).double(), nn.MultiheadAttention(16, 4, batch_first=True, dtype=torch.float64)
    nn.init.normal_(m.qkv.bias)
    ref.in_proj_weight.data,ref.in_proj_bias.data = m.qkv.weight.data,m.qkv.bias.data
    ref.out_proj.load_state_dict(m.proj.state_dict())
    x,B = normal(3, 9, 16), normal(4, 9, 9, seed=1)
    assert (m(x, bias=B)-ref(x, x, x, attn_mask=B.repeat(3, 1, 1))[0]).abs().max()<1e-12

def test_attention_shift():
    m = Attention(8, 2).double()
    x,s = normal(2, 5, 8), normal(2, 1, 24, seed=1)
    q,k,v = (F.linear(x, m.qkv.weight, m.qkv.bias)+s).chunk(3, -1)
    assert (m(x, shift=s)-m.proj(attend(q, k, v, 2))).abs().max()<1e-12 and (m(x, shift=s)-m(x)).abs().max()>.01

def test_attention_under_autocast():
    "The bias is a float32 parameter, the scores are not."
    m,b = Attention(16, 4),RelBias(3, 4)
    with torch.autocast('cpu', torch.bfloat16): assert m(torch.randn(1, 9, 16, generator=gen()), bias=b()).dtype==torch.bfloat16

def test_heads_must_divide():
    with pytest.raises(ValueError, match='do not divide'): Attention(10, 4)

def test_patches():
    x = torch.arange(2*3*8*12.).view(2, 3, 8, 12)
    p = patchify(x, 4)
    assert p.shape==(2, 6, 48) and torch.equal(unpatchify(p, 4, (8, 12)), x)
    assert p[1,4,(2*4+3)*3+1]==x[1,1,4+2,4+3] # token 4 is row 1, column 1; order row, column, channel
    with pytest.raises(ValueError, match='do not tile'): patchify(x, 5)

@pytest.mark.parametrize('size', [1, 2, 4, 8])
def test_windows_roundtrip(size):
    x = normal(2, 8, 16, 3)
    w = windows(x, size)
    assert w.shape==(2, 128//size**2, size**2, 3) and torch.equal(unwindows(w, size, 8), x)
    assert torch.equal(w[1,1].view(size, size, 3), x[1,:size,size:2*size])

def test_windows_must_tile():
    with pytest.raises(ValueError, match='do not tile a map of 8x12'): windows(normal(1, 8, 12, 1), 8)

@pytest.mark.parametrize('w,rows', [(4, 49), (8, 225), (16, 961), (32, 3969)])
def test_rel_bias_table(w, rows):
    "Spec 1, check 4: the sizes of the table, one row for each offset."
    assert RelBias(w, 2).table.shape==(rows, 2)
    assert offsets(w).unique().tolist()==list(range(rows))

def test_rel_bias_depends_on_the_offset_alone():
    m = RelBias(5, 3).double()
    nn.init.normal_(m.table)
    B = m().detach()
    pos = [(i//5, i%5) for i in range(25)]
    seen = {}
    for i,(a,b) in enumerate(pos):
        for j,(c,d) in enumerate(pos): assert torch.equal(seen.setdefault((a-c, b-d), B[:,i,j]), B[:,i,j])
    assert len(seen)==81 and len({tuple(o.tolist()) for o in seen.values()})==81

def test_rel_bias_index_is_no_weight():
    "The index is made anew, never stored."
    assert list(RelBias(4, 2).state_dict())==['table']
