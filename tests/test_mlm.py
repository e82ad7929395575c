"The transformers that guess tokens: masks of block diffusion against the rule itself, cached against computed anew, pads, prompts, sizes."
import math
import pytest, torch
import torch.nn.functional as F
from torch import nn
from diffnb.core import create, mean_loss
from diffnb.guidance import constant
from diffnb.models.mlm import MLM, PostNorm, PreNorm, SelfAttention, SwiGLU, bert_tiny, mlm_tiny, visible
from diffnb.process.masked import Masked
from diffnb.rng import Rng
from diffnb.samplers import sample
from diffnb.samplers.masked import blocks

F64 = torch.float64
def gen(seed=0): return torch.Generator().manual_seed(seed)
def diff(a, b): return (a-b).abs().max().item()
def randomised(net, std=.3, seed=0):
    r = gen(seed)
    for p in net.parameters(): p.data = std*torch.randn(p.shape, generator=r, dtype=p.dtype)
    return net.eval()
def tokens(*s, v=48, seed=0): return torch.randint(v, s, generator=gen(seed))
T = torch.full((1,), .3, dtype=F64)

# --- who looks at whom (spec 1.6, acceptance 1.15)
def rule(B, i, j, i_clean, j_clean):
    "Arriola et al. 2025, section 3.3: block-diagonal, offset block-causal, block-causal."
    if not i_clean and not j_clean: return i//B==j//B
    if not i_clean and j_clean: return j//B<i//B
    return i_clean and j_clean and j//B<=i//B

@pytest.mark.parametrize('n, B', [(4, 2), (12, 4), (12, 1), (12, 12), (15, 5)])
def test_mask_is_the_rule_and_its_count(n, B):
    q,nb = torch.arange(n),n//B
    got = {(False, False): torch.eq, (False, True): torch.gt, (True, True): torch.ge}
    total = 0
    for (ic,jc),how in got.items():
        see = visible(q, q, B, how)[0,0]
        assert see.tolist()==[[rule(B, i, j, ic, jc) for j in range(n)] for i in range(n)]
        total += see.sum().item()
    assert total==B**2*(nb+nb**2)

def two_copies(net, x, clean, mask=None):
    "The training input as one sequence [noisy; clean], with the whole mask: what `clean` must equal."
    n,B = x.shape[1],net.block
    see = torch.tensor([[rule(B, i%n, j%n, i>=n, j>=n) for j in range(2*n)] for i in range(2*n)])[None,None]
    if mask is not None: see = see & torch.cat([mask, mask], 1)[:,None,None]
    see = see | ~see.any(-1, keepdim=True)
    pos = net.places(x, mask)
    pos = torch.cat([pos, pos], 1)
    h,c = net.embed(torch.cat([x, clean], 1), pos.expand(len(x), -1)),None
    if net.time is not None: # the clean copy is at time 0
        c = torch.cat([F.silu(net.time(o.expand(len(x))))[:,None].expand(-1, n, -1) for o in (T, 0*T)], 1)
    for b in net.blocks: h = b(h, c, turn=net.turn(pos, h), look=see)
    return net.out(net.last(h[:,:n], *([] if c is None else [c[:,:n]])))

NETS = {'mlm': lambda **kw: mlm_tiny(time=0, **kw), 'mlm with time': mlm_tiny, 'bert': bert_tiny}
each = pytest.mark.parametrize('make', NETS.values(), ids=NETS)

@each
@pytest.mark.parametrize('pads', [False, True])
def test_clean_copy_is_the_doubled_sequence(make, pads):
    net = randomised(make(block=4)).double()
    x,clean = tokens(2, 12),tokens(2, 12, seed=1)
    mask = torch.arange(12)<torch.tensor([[12], [10]]) if pads else None
    with torch.no_grad():
        got,want = net(x, T, clean=clean, mask=mask),two_copies(net, x, clean, mask)
        keep = torch.ones_like(x).bool() if mask is None else mask
        assert diff(got[keep], want[keep])<1e-10 and diff(got, net(x, T, **net.prepare(clean=clean, mask=mask)))==0

@each
def test_clean_block_j_changes_later_noisy_blocks_alone(make):
    net = randomised(make(block=4)).double()
    x,clean = tokens(1, 12),tokens(1, 12, seed=1)
    with torch.no_grad():
        before = net(x, T, clean=clean)
        for j in range(3):
            other = clean.clone()
            other[:,4*j:4*j+4] = (other[:,4*j:4*j+4]+1)%48
            changed = (net(x, T, clean=other)-before).abs().amax((0, 2))>1e-9
            assert torch.equal(changed, torch.arange(12)>=4*j+4)
            noisy = x.clone()
            noisy[:,4*j:4*j+4] = (noisy[:,4*j:4*j+4]+1)%48
            changed = (net(noisy, T, clean=clean)-before).abs().amax((0, 2))>1e-9
            assert torch.equal(changed, torch.arange(12)//4==j)

@each
def test_one_block_sees_itself_alone(make):
    "B = n: the clean copy is of no use, and the network is the plain one."
    net = randomised(make(block=12)).double()
    x = tokens(2, 12)
    plain = make()
    plain.load_state_dict(net.float().state_dict())
    net,plain = net.double(),plain.double().eval()
    with torch.no_grad():
        assert diff(net(x, T, clean=tokens(2, 12, seed=1)), plain(x, T))<1e-10 and diff(net(x, T), plain(x, T))<1e-10

@each
@pytest.mark.parametrize('m', [4, 8])
def test_cached_past_is_the_whole_computation(make, m):
    "Finished blocks prepared, the rest given as x, one block or several: as if all were given at once."
    net = randomised(make(block=4)).double()
    x = tokens(2, 16)
    t = torch.cat([0*T.expand(2, m), T.expand(2, 16-m)], 1) # finished text is at time 0
    with torch.no_grad():
        whole = net(x, t)
        ready = net.prepare(ids=x[:,:m])
        assert diff(net(x[:,m:], T, **ready), whole[:,m:])<1e-10
        assert diff(net(x[:,m:], T, ids=x[:,:m]), whole[:,m:])<1e-10
        one = net.prepare(ids=x[:1,:m]) # one prompt for all samples
        assert diff(net(x[:,m:], T, **one)[0], whole[0,m:])<1e-10

@each
def test_generating_block_by_block_with_and_without_cache(make):
    "Greedy, four blocks: the same tokens, logits to 1e-5 in float32 (acceptance 1.15)."
    net = randomised(make(block=4))
    past,text = {},torch.zeros(2, 0, dtype=torch.long)
    t0 = torch.zeros(1, dtype=F64)
    with torch.no_grad():
        for k in range(4):
            x = torch.full((2, 4), net.mask_id)
            for _ in range(2): # two steps a block
                ready = net.prepare(ids=text) if k else {}
                a,b = net(x, t0, **ready),net(torch.cat([text, x], 1), t0)[:,4*k:]
                assert diff(a, b)<1e-5*max(1, b.abs().max().item())
                x = torch.where(x==net.mask_id, a[...,:48].argmax(-1), x)
            text = torch.cat([text, x], 1)

@each
def test_pads_in_the_past(make):
    "Prompts of 3, 8 and 5 tokens, each filled up to blocks: what follows sees no pad and no shift."
    net = randomised(make(block=4)).double()
    texts,x = [tokens(1, n, seed=n) for n in (3, 8, 5)],tokens(3, 4, seed=9)
    ids,ok = tokens(3, 8, seed=5),torch.zeros(3, 8, dtype=torch.bool)
    for i,o in enumerate(texts): ids[i,8-o.shape[1]:],ok[i,8-o.shape[1]:] = o[0],True
    with torch.no_grad():
        got,other = (net(x, T, **net.prepare(ids=torch.where(ok, ids, r), ids_mask=ok)) for r in (ids, tokens(3, 8, seed=6)))
        assert diff(got, other)<1e-10
        assert diff(got[1:2], net(x[1:2], T, ids=texts[1]))<1e-10
        four = net(x[:1], T, ids=ids[:1,4:], ids_mask=ok[:1,4:]) # a whole block of pads less
        assert diff(got[:1], four)<1e-10

def test_gradient_reaches_the_clean_copy():
    net = mlm_tiny(block=4)
    for p in net.parameters(): nn.init.normal_(p, std=.2)
    x = tokens(2, 12)
    net(x, T, **net.prepare(clean=tokens(2, 12, seed=1)))[:,8:].square().sum().backward()
    k = net.blocks[0].attn.layer.qkv.weight.grad[48:96].norm()
    net.zero_grad()
    with torch.no_grad(): ready = net.prepare(clean=tokens(2, 12, seed=1))
    net(x, T, **ready)[:,8:].square().sum().backward()
    assert k>0 and (net.blocks[0].attn.layer.qkv.weight.grad[48:96].norm()-k).abs()>1e-3*k

# --- pads (acceptance 1.16)
@each
@pytest.mark.parametrize('block', [0, 4])
def test_pads_never_matter(make, block):
    "Lengths 5, 9 and 16 in one batch; pads of any content, to the right; with blocks, too. float32, as in use."
    net,t = randomised(make(block=block), .2),torch.rand(3, dtype=F64, generator=gen(2))
    texts = [tokens(1, n, seed=n) for n in (5, 9, 16)]
    x,mask = tokens(3, 16, seed=3),torch.arange(16)<torch.tensor([5, 9, 16])[:,None]
    for i,o in enumerate(texts): x[i,:o.shape[1]] = o[0]
    with torch.no_grad():
        y,alone = net(x, t, mask=mask),[net(o, t[i:i+1]) for i,o in enumerate(texts)]
        scale = max(1., *(o.abs().max().item() for o in alone))
        for i,o in enumerate(alone): assert diff(y[i,:o.shape[1]], o[0])<1e-6*scale
        if not block: assert diff(net(x, t)[0,:5], alone[0][0])>1e-3 # without the mask they would

@each
def test_pads_anywhere(make):
    net,text = randomised(make()).double(),tokens(1, 9)
    with torch.no_grad():
        alone = net(text, T)
        for mask in (torch.arange(14)>4, torch.tensor([1,1,0,1,0,0,1,1,1,0,1,1,1,0]).bool()):
            assert diff(net(tokens(1, 14, seed=1).masked_scatter(mask[None], text), T, mask=mask[None])[:,mask], alone)<1e-10

@each
@pytest.mark.parametrize('block', [0, 4])
def test_nothing_but_pads_is_finite(make, block):
    "A sample that holds nothing does not poison the batch's gradient."
    net = make(block=block).train()
    x,mask = tokens(2, 8),torch.tensor([[True]*8, [False]*8])
    y = net(x, T, mask=mask)
    (y*mask[...,None]).square().sum().backward()
    assert net.look(x, mask).any(-1).all() # not every attention can take a row of nothing
    assert y.isfinite().all() and all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())

def test_pads_change_no_loss():
    process,net = Masked('straight', 48, 48),randomised(mlm_tiny(time=0), .2)
    text,keep = tokens(2, 9),torch.arange(9).expand(2, -1)<3
    t,r = torch.tensor([.3, .8], dtype=F64),Rng(0)
    x,m = torch.cat([text, tokens(2, 5, seed=1)], 1),torch.arange(14).expand(2, -1)<9
    def call(mask): return lambda x, t: net(x, t, mask=mask)
    long = process.loss(call(m), x, t, F.pad(keep, (0, 5)), m, r)
    hidden = process.corrupt(x, t, F.pad(keep, (0, 5)) | ~m, r)[1][:,:9]
    with torch.no_grad(): want = process.nll(call(None), torch.where(hidden, 48, text), text, t)
    assert hidden.any() and diff(long.value[:,:9], (process.rate(t)[:,None]*want).float())<1e-5
    assert not long.value[:,9:].any() and not long.mask[:,9:].any()

# --- the head where it is asked for
@each
def test_head_runs_on_rows_alone(make, monkeypatch):
    "Sampling through the process gives the same tokens as with the whole head, and the head saw hidden places only."
    net = randomised(make(), .2)
    process = Masked('straight', net.mask_id, 48)
    seen,head = [],MLM.head
    def counted(self, feats): seen.append(feats.h.shape[:2].numel()); return head(self, feats)
    monkeypatch.setattr(MLM, 'head', counted)
    a = list(sample(net, process, (2, 12), steps=6, rng=Rng(1)))[-1]
    late,seen[:] = sum(seen),[]
    def whole(x, net_t, **cond): return net(x, net_t, **cond)
    b = list(sample(whole, process, (2, 12), steps=6, rng=Rng(1)))[-1]
    assert torch.equal(a, b) and late<sum(seen)/1.5

@each
def test_block_by_block_through_the_sampler(make):
    "Left to right by `blocks`, where some samples are finished before others; and block after block with `ids`."
    net = randomised(make(block=4), .2)
    process,known = Masked('straight', net.mask_id, 48),4+tokens(3, 12, v=44)
    keep = torch.arange(12)<torch.tensor([0, 5, 12])[:,None]
    def whole(x, net_t, **cond): return net(x, net_t, **cond)
    a,b = (list(sample(f, process, (3, 12), steps=6, step=blocks(size=4), known=known, keep=keep)) for f in (net, whole))
    assert all(map(torch.equal, a, b)) and (a[-1]!=net.mask_id).all() and torch.equal(a[-1][keep], known[keep])
    text = a[-1][:,:4]
    for k in range(2):
        new = list(sample(net, process, (3, 4), steps=2, cond=dict(ids=text), rng=Rng(k)))[-1]
        assert (new!=net.mask_id).all()
        text = torch.cat([text, new], 1)

@each
@pytest.mark.parametrize('t', [T, torch.tensor([.1, .9], dtype=F64), torch.rand(2, 12, dtype=F64, generator=gen())])
def test_rows_of_any_time(make, t):
    net = randomised(make(), .2).double()
    x = tokens(2, 12)
    with torch.no_grad():
        f = net.features(x, t)
        want = net.head(f)
        assert diff(want, net(x, t))==0 and (net.time is None or diff(want, net(x, t/2))>1e-3)
        c = None if f.c is None else f.c.expand(2, 12, -1)[[0, 1], [3, 7]][:,None]
        assert diff(net.head(f._replace(h=f.h[[0, 1], [3, 7]][:,None], c=c))[:,0], want[[0, 1], [3, 7]])<1e-12

# --- prompts
@each
def test_null_hides_the_prompt(make):
    net = make(block=4)
    x,keep = tokens(2, 8),torch.arange(8).expand(2, -1)<3
    cond = dict(mask=torch.ones_like(x).bool(), ids=tokens(2, 4), clean=tokens(2, 8, seed=2))
    nx,nc = net.null(x, keep=keep, **cond)
    assert (nx[:,:3]==net.mask_id).all() and torch.equal(nx[:,3:], x[:,3:])
    assert (nc['ids']==net.mask_id).all() and (nc['clean'][:,:3]==net.mask_id).all() and torch.equal(nc['clean'][:,3:], cond['clean'][:,3:])
    assert nc['mask'] is cond['mask'] and torch.equal(net.null(x)[0], x)
    with pytest.raises(ValueError, match='not what prepare made'): net.null(x, **net.prepare(ids=cond['ids']))

@each
def test_guidance_and_prompts(make):
    "w = 1 is the conditional network to the bit; prompts stay through guided sampling, also when finished blocks are prepared."
    net = randomised(make(block=4), .2)
    process = Masked('straight', net.mask_id, 48)
    x,keep = 4+tokens(2, 8, v=44),torch.arange(8).expand(2, -1)<3 # 3 is BERT's mask here
    cond = dict(ids=tokens(2, 4, seed=4))
    with torch.no_grad():
        a,b = constant(1.)(net, cond, keep=keep)(x, T),net(x, T, **cond)
        assert torch.equal(a, b) and not torch.equal(constant(2.)(net, cond, keep=keep)(x, T), b)
    out = list(sample(net, process, (2, 8), steps=4, w=2., cond=cond, known=x, keep=keep))[-1]
    assert torch.equal(out[:,:3], x[:,:3]) and (out!=net.mask_id).all()

# --- errors
@pytest.mark.parametrize('f, says', [
    (lambda: mlm_tiny()(torch.zeros(2, 0, dtype=torch.long), T), 'at least 1'),
    (lambda: bert_tiny()(tokens(1, 65), T), '65 tokens, and the network has 64 places'),
    (lambda: bert_tiny(block=4)(tokens(1, 4), T, ids=tokens(1, 64)), '68 tokens'),
    (lambda: mlm_tiny()(tokens(1, 4), T, mask=torch.ones(1, 5).bool()), r'mask is \(1, 5\)'),
    (lambda: mlm_tiny()(tokens(1, 4), T, types=tokens(1, 4)), 'no segments'),
    (lambda: mlm_tiny()(tokens(1, 4), T, ids=tokens(1, 4)), 'writes in blocks'),
    (lambda: mlm_tiny(block=4)(tokens(1, 4), T, ids=tokens(1, 6)), '6 tokens, no blocks of 4'),
    (lambda: mlm_tiny(block=4).prepare(ids=tokens(1, 4), clean=tokens(1, 4)), 'ids, before x, or as clean'),
    (lambda: mlm_tiny(block=4)(tokens(1, 4), T, clean=tokens(1, 8)), 'clean has 8 tokens, and x has 4'),
    (lambda: mlm_tiny(heads=5), '5 heads'), (lambda: mlm_tiny(dim=36, heads=12), '12 heads'),
    (lambda: bert_tiny(heads=5), '5 heads'), (lambda: bert_tiny(mask_id=48), 'one of the 48')])
def test_errors(f, says):
    with pytest.raises(ValueError, match=says): f()

# --- sizes and fresh weights
SIZES = {'mlm_110m': (768, 12, 2048), 'mlm_350m': (1024, 24, 2816), 'mlm_1300m': (2048, 24, 5632), 'mlm_7b': (4096, 32, 11_008)}
@pytest.mark.parametrize('name', SIZES)
@pytest.mark.parametrize('time', [0, 128])
def test_counts_by_hand(name, time):
    d,depth,hidden = SIZES[name]
    with torch.device('meta'): net = create(name, time=time)
    n = depth*(4*d*d+3*d*hidden+2*d)+d+32_001*d+(32_000*d if name=='mlm_7b' else 0)
    if time: n += depth*6*d*(time+1)+2*d*(time+1)+(256+1+time+1)*time
    assert sum(p.numel() for p in net.parameters())==n
    low,high = {'mlm_110m': (.10e9, .12e9), 'mlm_350m': (.33e9, .37e9), 'mlm_1300m': (1.2e9, 1.4e9), 'mlm_7b': (6.7e9, 6.9e9)}[name]
    assert low<n<high

def test_published_counts():
    with torch.device('meta'): n = {o: sum(p.numel() for p in create(o).parameters()) for o in ('bert_base', 'mlm_7b')}
    assert n=={'bert_base': 109_514_298, 'mlm_7b': 6_738_415_616+4096} # BertForMaskedLM; LLaMA 7B and a row for the mask

def test_fresh_weights():
    net = mlm_tiny(depth=3)
    x,t,cond = net.demo(2)
    assert torch.equal(net(x, t, **cond), net(x, t+.4, **cond)) # the time has no effect yet,
    assert torch.equal(net.features(x, t, **cond).h, net.embed(x, net.places(x))) # and gates are shut
    assert net.out.weight is net.embed.tokens.weight and abs(net.out.weight.std()-.02)<.002
    assert mlm_tiny(tied=False).out.weight.shape==(48, 48) and not bert_tiny().blocks[0].attn.layer.qkv.bias.any()
    assert mlm_tiny().mask_id==48 and mlm_tiny(mask_id=7).embed.tokens.num_embeddings==48 and bert_tiny().mask_id==3

def test_parts_against_formulas():
    x,c = torch.randn(2, 5, 8, generator=gen(), dtype=F64),torch.randn(2, 1, 3, generator=gen(1), dtype=F64)
    net = randomised(PreNorm(SwiGLU(8, 12), 8, 3, eps=.1)).double()
    n = net.norm.norm.weight*x/(x.square().mean(-1, keepdim=True)+.1).sqrt()
    shift,scale = net.norm.mod(c).chunk(2, -1)
    a,b = (((1+scale)*n+shift)@net.layer.up.weight.T).chunk(2, -1)
    want = x+net.gate(c)*((F.silu(a)*b)@net.layer.down.weight.T)
    assert diff(net(x, c), want)<1e-12
    post = randomised(PostNorm(SwiGLU(8, 12), 8, eps=.1)).double()
    h = x+post.layer(x)
    h = (h-h.mean(-1, keepdim=True))/(h.var(-1, correction=0, keepdim=True)+.1).sqrt()
    assert diff(post(x), h*post.norm.weight+post.norm.bias)<1e-12

def test_attention_against_loops():
    "Two heads, each question and key turned by its place, softmax over what is seen."
    net,x = randomised(SelfAttention(8, 2)).double(),torch.randn(1, 4, 8, generator=gen(), dtype=F64)
    from diffnb.models.flux import rotary
    see,theta = torch.tensor([[1,1,0,0], [1,1,1,0], [0,1,1,1], [0,0,1,1]]).bool(),[1., 1/100]
    q,k,v = net.qkv(x)[0].chunk(3, -1)
    def turn(o, p): # pairs of channels as complex numbers
        z = torch.view_as_complex(o.reshape(2, 2, 2).contiguous())*torch.tensor([complex(math.cos(p*w), math.sin(p*w)) for w in theta], dtype=torch.complex128)
        return torch.view_as_real(z).flatten(1)
    out = torch.zeros(4, 2, 4, dtype=F64)
    for i in range(4):
        for h in range(2):
            s = torch.stack([turn(q[i], i)[h]@turn(k[j], j)[h]/2 for j in range(4)])
            out[i,h] = s.masked_fill(~see[i], -math.inf).softmax(0)@v[:,4*h:4*h+4]
    got = net(x, rotary(torch.arange(4.).double()[:,None], (4,)), see[None,None])
    assert diff(got[0], net.proj(out.flatten(1)))<1e-10

def test_dropout_acts_in_training_alone():
    net = bert_tiny(dropout=.5)
    x,t,cond = net.demo(2)
    assert torch.equal(net.eval()(x, t, **cond), net(x, t, **cond)) and not torch.equal(net.train()(x, t, **cond), net(x, t, **cond))

def test_half_precision():
    for make in NETS.values():
        net = randomised(make(), .1)
        x,t,cond = net.demo(2)
        with torch.no_grad(): a,b = net(x, t, **cond),net.bfloat16()(x, t, **cond)
        assert b.dtype==torch.bfloat16 and diff(a, b.float())<.1*a.abs().max()

def test_learns():
    "Counting modulo 12: the bound falls to near the entropy of the first token, and no lower."
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        net = mlm_tiny(vocab=12, time=16, n=8)
    process,text = Masked('straight', 12, 12),(torch.arange(12)[:,None]+torch.arange(8))%12
    opt = torch.optim.AdamW(net.parameters(), lr=5e-3)
    for i in range(120):
        r = Rng(0).at('step', step=i)
        u = ((r.at('t').uniform(1)+torch.arange(48)/48)%1).clamp(min=1e-3)
        loss = mean_loss(process.loss(net, text.repeat(4, 1), u, rng=r))
        opt.zero_grad(); loss.backward(); opt.step()
    bound = process.nelbo(net.eval(), text, m=24).mean().item()/8
    assert math.log(12)/8-.02<bound<.8
