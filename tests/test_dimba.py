"DIMBA: no leak, what begins as nothing, pads, prompts, guidance, sizes; through `Gaussian`, `TokenCodec`, `sample` and `fit` as they are."
import inspect, math
from functools import partial
import pytest, torch
import torch.nn.functional as F
from diffnb.codec.core import TokenCodec, token_codec
from diffnb.core import create, mean_loss
from diffnb.data.toy import cyclic_text
from diffnb.guidance import bind, constant, without
from diffnb.models.dimba import Dimba, PromptEncoder, additive, dimba, dimba_130m, dimba_1300m, dimba_512, dimba_tiny, film
from diffnb.models.mamba2 import both
from diffnb.process.gaussian import Gaussian, SelfCond, predictions
from diffnb.rng import Rng
from diffnb.samplers import ancestral, ddim, dpmpp_2m, sample
from diffnb.schedules import cosine, scaled_linear, zero_snr
from diffnb.tokens import narrow
from diffnb.train.loop import fit
from diffnb.train.task import DiffusionTask, adamw, constant as steady
from diffnb.weights import min_snr

F64 = torch.float64
def randomised(net, seed=0):
    g = torch.Generator().manual_seed(seed)
    for p in net.parameters(): p.data = (torch.randn(p.shape, generator=g)*(p[0].numel()**-.5 if p.ndim>1 else .3)).to(p)
    return net.eval()
def process(pred='x0', **kw): return Gaussian(zero_snr('cosine'), pred, **kw)

@pytest.fixture(scope='module')
def net(): return randomised(dimba_tiny())

# --- 4.1: the end of the schedule
@pytest.mark.parametrize('schedule', [cosine(1000), cosine(50), scaled_linear(), cosine(), cosine(s=.2)], ids=str)
def test_exactly_no_signal_at_the_end(schedule):
    s = zero_snr(schedule)
    assert s(1.)[0]==0 and s(1.)[1]==1
    t = torch.linspace(0, 1, (s.T or 200)+1, dtype=F64)
    abar = s(t)[0]**2
    assert (abar.diff()<0).all() and (s.T is None or abs(s.abar[0]-schedule.abar[0])<1e-15)
    for pred in ('x0', 'v'): Gaussian(s, pred)
    with pytest.raises(ValueError, match='no signal'): Gaussian(s, 'eps')

def test_without_it_some_signal_is_left():
    i = torch.arange(1000, dtype=F64)/1000
    def f(u): return torch.cos((u+.008)/1.008*math.pi/2)**2
    assert math.isclose((f(i)/f(i[:1]))[999].item(), 2.43e-6, rel_tol=.01)

# --- 4.2 and 4.4: DDIM with the truth, and the rows
@pytest.mark.parametrize('steps', [1, 2, 3, 7, 40])
@pytest.mark.parametrize('pred', ['x0', 'v'])
def test_ddim_with_the_truth(pred, steps):
    p, c = process(pred), token_codec(30, 8).double()
    x0 = c.encode(Rng(0).integers(30, 4, 6)).detach()
    eps = Rng(1).normal(4, 6, 8, dtype=F64)
    net = p.oracle(lambda x, alpha, sigma: x0)
    xs = list(sample(net, p, (4, 6, 8), steps, ddim(), x=eps, dtype=F64))
    times = torch.linspace(1, 0, steps+1, dtype=F64)[1:]
    for x,s in zip(xs, times): assert (x-p.move(x0, eps, s[None])).abs().max()<1e-6
    assert (xs[-1]-x0).abs().max()<1e-6 and torch.equal(c.decode(xs[-1]), c.decode(x0))

@pytest.mark.parametrize('pred', ['x0', 'v'])
def test_rows_invert_up_to_the_end(pred):
    p, t = process(pred), torch.cat([torch.linspace(.001, 1, 50, dtype=F64), torch.ones(1, dtype=F64)])
    x0, eps = Rng(0).normal(51, 3, dtype=F64), Rng(1).normal(51, 3, dtype=F64)
    a,b = (o[:,None] for o in predictions[pred].target(*p.schedule(t)))
    est = p.estimate(lambda x, net_t: a*x0+b*eps, p.move(x0, eps, t), t)
    assert est.x0.isfinite().all() and est.eps.isfinite().all()
    seen = slice(None, -2) if pred=='v' else slice(None) # v at t = 1 is -x0: there, too, x0 is read
    assert (est.x0-x0)[seen].abs().max()<1e-9 and (est.x0-x0).abs().max()<1e-6
    assert (est.eps-eps)[10:].abs().max()<1e-9

# --- 4.5: no leak
@pytest.mark.parametrize('dtype,tol', [(F64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize('pred', ['x0', 'eps', 'v'])
def test_rows_invert_where_there_is_signal(pred, dtype, tol):
    "From (x_t, raw) back to x0 and eps, noise included among the rows, wherever both are in x_t; errors count in units of what is divided by."
    s = cosine(1000)
    p, t = Gaussian(s, pred), torch.tensor([.001, .1, .5, .9, .99], dtype=F64)
    x0, eps = Rng(0).normal(5, 64, dtype=dtype), Rng(1).normal(5, 64, dtype=dtype)
    alpha, sigma = (o[:,None] for o in s(t))
    x_t = (alpha*x0.to(F64)+sigma*eps.to(F64)).to(dtype)
    raw = dict(x0=x0, eps=eps, v=(alpha*eps.to(F64)-sigma*x0.to(F64)).to(dtype))[pred]
    est = p.estimate(lambda x, net_t: raw, x_t, t)
    grown = dict(x0=1+0*alpha, eps=1/alpha, v=1+0*alpha)[pred] # by which rounding grows on the way to x0
    assert ((est.x0.to(F64)-x0)/grown).abs().max()<4*tol and ((est.eps.to(F64)-eps)*sigma).abs().max()<4*tol

def test_what_steers_depends_on_the_prompt_alone(net):
    x,net_t,cond = net.demo(3)
    keep,mask = cond['keep'],cond['mask']
    def steer(x):
        f = net.features(x, net_t, keep=keep, mask=mask)
        return f.c
    given = keep & mask
    other = torch.where(given[...,None], x, torch.randn(x.shape, generator=torch.Generator().manual_seed(9))*100)
    assert torch.equal(steer(x), steer(other)) # the answer changed, and the last estimate
    moved = torch.where(given[...,None], x+.1, x)
    assert not torch.allclose(steer(x), steer(moved))
    x = x.clone().requires_grad_()
    steer(x).square().sum().backward()
    assert x.grad[~given].abs().max()==0 and x.grad[given][:,:net.vec].abs().min()>0
    assert x.grad[given][:,net.vec:].abs().max()==0 # nor on what was estimated of the prompt

def test_nothing_of_the_clean_answer_reaches_the_network():
    "In training, what the network sees is the same for two answers if their noisy vectors are."
    seen = []
    def call(x, net_t):
        seen.append(x)
        return x
    p, keep = process(), (torch.arange(6)<2).expand(2, -1)
    a = Rng(0).normal(2, 6, 4)
    b = torch.where(keep[...,None], a, Rng(1).normal(2, 6, 4))
    for x0 in (a, b): p.loss(call, x0, torch.ones(2), keep, rng=Rng(2))
    assert torch.equal(*seen) and torch.equal(seen[0][keep], a[keep])

def test_the_leak_of_the_first_form_would_be_seen(net):
    enc, x = net.prompt, Rng(0).normal(2, 8, net.vec).requires_grad_()
    enc(x, torch.ones(2, 8, dtype=torch.bool)).sum().backward() # told that all of it is prompt
    assert x.grad[:,4:].abs().max()>1e-4

# --- 4.6: what begins as nothing
@pytest.mark.parametrize('norm', ['film', 'additive'])
def test_conditions_begin_as_nothing(norm):
    torch.manual_seed(0)
    net = dimba_tiny(norm=norm).eval()
    x,net_t,cond = net.demo()
    with torch.no_grad():
        net.held.zero_()
        y = net(x, net_t, **cond)
        assert torch.equal(y, net(x, net_t*0+.9, **cond)) # no time
        assert torch.equal(y, net(x, net_t, keep=cond['keep'], mask=cond['mask'], code=torch.randn(2, 48, generator=torch.Generator().manual_seed(0))))
        assert torch.equal(y, net(x[...,:16], net_t, **cond)) # no last estimate
        assert y.std()>.01
        plain = dimba_tiny(norm=norm, self_cond=False).eval() # the network without it, to the last bit
        plain.load_state_dict({k: v[:,:16] if k=='enter.weight' else v for k,v in net.state_dict().items()})
        assert (plain(x[...,:16], net_t, **cond)-y).abs().max()<1e-6

@pytest.mark.parametrize('norm', [film, additive])
def test_norms_by_hand(norm):
    m, h, c = randomised(norm(6, 4)), Rng(0).normal(2, 5, 6), Rng(1).normal(2, 1, 4)
    W,b = m.mod.weight,m.mod.bias
    want, k = F.rms_norm(h, (6,), m.norm.weight, 1e-5), c@W.T+b
    want = want*(1+k[...,6:])+k[...,:6] if norm is film else want+k
    assert torch.allclose(m(h, c), want, atol=1e-6)

def test_conditions_then_matter(net):
    x,net_t,cond = net.demo()
    with torch.no_grad():
        y = net(x, net_t, **cond)
        for o in (net(x, net_t+.3, **cond), net(x[...,:16], net_t, **cond), net(x, net_t, **{**cond, 'prompt': cond['prompt']+.1}),
                  net(x, net_t, mask=cond['mask']), net(x, net_t, keep=cond['keep'])): assert not torch.allclose(o, y, atol=1e-3)

def test_w_of_one_is_conditional(net):
    x,_,cond = net.demo()
    x, keep, mask = x[...,:16], cond['keep'], cond['mask']
    t = torch.full((1,), .4, dtype=F64)
    with torch.no_grad():
        assert torch.equal(constant(1.)(net, {}, None, keep, mask)(x, t), net(x, t, keep=keep, mask=mask))
        yes,no = net(x, t, keep=keep, mask=mask),without(net, {}, None, keep, mask)(x, t)
        hidden = x.masked_fill(keep[...,None], 0.)
        assert torch.equal(no, net(hidden, t, keep=keep, mask=mask)) and not torch.allclose(yes, no, atol=1e-3)
        assert torch.allclose(constant(3.)(net, {}, None, keep, mask)(x, t), no+3*(yes-no), atol=1e-5)
        changed = torch.where(keep[...,None], Rng(0).normal(*x.shape), x) # another prompt, hidden too
        assert torch.equal(no, without(net, {}, None, keep, mask)(changed, t))

def test_a_prepared_prompt_is_the_prompt_of_the_sequence(net):
    x,net_t,cond = net.demo(3)
    keep,mask,z = cond['keep'],cond['mask'],x[...,:16]
    with torch.no_grad():
        want = net(x, net_t, keep=keep, mask=mask)
        whole = dict(prompt=z, prompt_mask=keep & mask)
        for o in (cond, {**cond, **whole}, net.prepare(**{**cond, **whole}), net.prepare(**net.prepare(**cond))):
            assert torch.allclose(net(x, net_t, **o), want, atol=1e-5)
        assert 'prompt' not in net.prepare(**cond) and net.prepare(**cond)['code'].shape==(3, 48)
        with pytest.raises(ValueError, match='what prepare made'): net.null(x, **net.prepare(**cond))
        calls = []
        net.prompt.register_forward_hook(lambda *a: calls.append(1))
        known = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
        list(sample(net, process(self_cond=SelfCond()), known.shape, 5, cond=dict(prompt=known[:,:4]), known=known, keep=keep, mask=mask))
        assert len(calls)==1 # once for five steps
        net.prompt._forward_hooks.clear()

# --- 4.7: reading and the tied head
def test_one_table_for_all():
    c = token_codec(200, 16)
    x = torch.arange(200)[None]
    assert torch.equal(c.decode(c.encode(x)), x) and [p.data_ptr() for p in c.parameters()]==[c.rows.data_ptr()]
    task = DiffusionTask(dimba_tiny(), process(self_cond=SelfCond(), anchor=c.anchor()), c)
    assert sum(p.data_ptr()==c.rows.data_ptr() for p in task.net.parameters())==1 # the anchor brings no second table

# --- 4.8: what counts
@pytest.mark.parametrize('self_cond', [None, SelfCond(1.)])
def test_prompts_and_pads_do_not_count(net, self_cond):
    c = token_codec(30, 16)
    p = process(self_cond=self_cond, anchor=c.anchor(.5))
    x, place = Rng(0).integers(30, 3, 16), torch.arange(16).expand(3, -1)
    keep, mask = place<4, place<16-torch.arange(3)[:,None]
    z, t = c.encode(x).detach(), torch.tensor([.2, .6, 1.])
    target = z.clone().requires_grad_()
    raw = torch.zeros_like(z)
    mean_loss(p.loss(lambda x, net_t: raw, target, t, keep, mask, Rng(3))).backward() # the network sees nothing: targets alone
    counted = mask & ~keep
    assert target.grad[~counted].abs().max()==0 and target.grad[counted].abs().amax(-1).min()>0
    loss = mean_loss(p.loss(bind(net, None, keep, mask), z, t, keep, mask, Rng(3)))
    other = torch.where(mask[...,None], z, 77.)
    assert torch.allclose(loss, mean_loss(p.loss(bind(net, None, keep, mask), other, t, keep, mask, Rng(3))), atol=1e-6)

# --- 4.10: both ways, pads
def test_the_first_token_sees_the_last(net):
    x,net_t,_ = net.demo(1)
    x.requires_grad_()
    y = net(x, net_t)
    for i,j in ((0, -1), (-1, 0)):
        g, = torch.autograd.grad(y[0,i].sum(), x, retain_graph=True)
        assert g[0,j].abs().max()>1e-6

@pytest.mark.parametrize('mixer', ['both', 'quasi'])
@pytest.mark.parametrize('left', [False, True])
def test_pads_never_matter(mixer, left):
    net = randomised(dimba_tiny(mixer=mixer)).double()
    g = torch.Generator().manual_seed(0)
    texts = [torch.randn(1, n, 32, generator=g, dtype=F64) for n in (5, 9, 16)]
    def place(o, fill): # where each text stands among 16 places
        gap = o.new_full((1, 16-o.shape[1], *o.shape[2:]), fill)
        return torch.cat([gap, o] if left else [o, gap], 1)
    keep = [torch.arange(o.shape[1])[None]<2 for o in texts]
    mask = torch.cat([place(torch.ones(1, o.shape[1]).bool(), False) for o in texts])
    t = torch.tensor([.1, .5, .9], dtype=F64)
    with torch.no_grad():
        for fill in (0., 50.):
            y = net(torch.cat([place(o, fill) for o in texts]), t, keep=torch.cat([place(o, False) for o in keep]), mask=mask)
            for i,o in enumerate(texts): assert (y[i][mask[i]]-net(o, t[i:i+1], keep=keep[i])[0]).abs().max()<1e-6
            flags = torch.cat([place(o, True) for o in keep]) # a pad that is said to be held is still a pad
            assert torch.equal(y[mask], net(torch.cat([place(o, fill) for o in texts]), t, keep=flags, mask=mask)[mask])

def test_no_prompt_no_code(net):
    x,net_t,_ = net.demo()
    with torch.no_grad():
        none = torch.zeros(2, 16, dtype=torch.bool)
        assert torch.equal(net(x, net_t), net(x, net_t, keep=none))
        assert net.prompt(x[...,:16], none).abs().max()==0

# --- sampling: prompts, and every option together
@pytest.mark.parametrize('step', [ddim(), ddim(1.), ancestral(), dpmpp_2m()], ids='ddim eta ancestral dpmpp'.split())
@pytest.mark.parametrize('w', [1., 2.5])
def test_prompts_are_not_altered(net, step, w):
    c = token_codec(30, 16)
    x = Rng(0).integers(30, 3, 12)
    keep = torch.arange(12)<torch.tensor([3, 0, 7])[:,None]
    z = c.encode(x).detach()
    for clean in (None, c.snap(), c.snap(narrow(k=3))):
        p = process('v', self_cond=SelfCond(), clean=clean)
        for o in sample(net, p, z.shape, 4, step, known=z, keep=keep, w=w, rng=Rng(1)):
            assert o.isfinite().all() and torch.equal(o[keep], z[keep])
        assert torch.equal(c.decode(o)[keep], x[keep])

def test_samples_do_not_depend_on_their_batch(net):
    z, keep = Rng(0).normal(4, 12, 16), (torch.arange(12)<4).expand(4, -1)
    def run(i): return list(sample(net, process(self_cond=SelfCond()), z[i].shape, 4, known=z[i], keep=keep[i], rng=Rng(1).of(i)))[-1]
    assert torch.allclose(run([0, 1, 2, 3])[[1, 3]], run([1, 3]), atol=1e-5)

def test_the_last_estimate_is_seen(net):
    "Each step sees what the step before estimated, the first sees zeros."
    seen, p = [], process(self_cond=SelfCond())
    def spy(x, net_t, **cond):
        seen.append(x)
        return net(x, net_t, **cond)
    made = []
    class Note:
        def __call__(self, x, net_t, **cond):
            raw = spy(x, net_t, **cond)
            made.append(raw)
            return raw
    list(sample(Note(), p, (2, 8, 16), 3))
    assert seen[0][...,16:].abs().max()==0 and [o.shape[-1] for o in seen]==[32]*3
    for a,b in zip(made, seen[1:]): assert torch.equal(a, b[...,16:]) # x0 is what the network gives

# --- training
def test_options_of_the_loss():
    "Self-conditioning in training: chosen by key, not by batch; without a gradient through the first answer."
    p, W = process(self_cond=SelfCond(.5)), torch.randn(8, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    x0, t = Rng(0).normal(64, 5, 4), torch.full((64,), .5)
    seen = []
    def call(x, net_t):
        seen.append(x)
        return x@W
    loss = p.loss(call, x0, t, rng=Rng(1).of(range(64))).value
    used = (seen[1][...,4:]!=0).flatten(1).any(1)
    assert len(seen)==2 and 16<used.sum()<48 and torch.equal(seen[1][used][...,4:], (seen[0]@W)[used])
    assert not seen[1].requires_grad
    half = p.loss(call, x0[10:20], t[10:20], rng=Rng(1).of(range(10, 20))).value
    assert torch.allclose(half, loss[10:20], atol=1e-6)
    for share in (0., 1.):
        seen.clear()
        q = process(self_cond=SelfCond(share))
        q.loss(call, x0, t, rng=Rng(1))
        assert len(seen)==1+int(share)

class Circle:
    "Texts that count around a circle, with a prompt of three tokens, as `fit` wants them."
    def __call__(self, start=0, batch=32, drop=True):
        i = start
        while True:
            x = cyclic_text(batch, 10, seed=i//batch).x
            keep = (torch.arange(10)<3).expand(batch, -1)
            yield dict(x=x, keep=keep, idx=torch.arange(i, i+batch), cond=dict(prompt=None))
            i += batch

def task_for(seed=0, learn=True, **kw):
    torch.manual_seed(seed)
    c = token_codec(8, 16, learn=learn)
    p = process(self_cond=SelfCond(), anchor=c.anchor(), weight=min_snr(5.), **kw)
    return DiffusionTask(dimba_tiny(dim=32, cond=32), p, c, drop=.1, optimiser=adamw(0.), lr=steady(5e-3))

@pytest.fixture(scope='module')
def trained():
    task = task_for()
    spread = lambda: task.codec.vectors(task.codec.rows.detach()).var(0).mean().item()
    before = spread()
    run = fit(task, Circle(), 200, averages={}, bar=False)
    return task, run, before, spread()

def test_it_learns_through_the_common_loop(trained):
    "As any other task, with the table, hidden prompts, anchor and self-conditioning."
    task, run, _, _ = trained
    x, keep = cyclic_text(64, 10, seed=999).x, (torch.arange(10)<3).expand(64, -1)
    z = task.codec.encode(x).detach()
    def right(known, **kw):
        out = list(sample(task.denoiser, task.process, z.shape, 8, ddim(), known=known, keep=keep, rng=Rng(5), **kw))[-1]
        assert torch.equal(out[keep], known[keep])
        return (task.codec.decode(out)==x)[:,3:].float().mean().item()
    own, others = right(z), right(z.roll(1, 0))
    assert own>.35 and own>others+.2, (own, others) # chance is 1/8; half are right, sd .02
    assert right(z, w=1.5)>.35

def test_vectors_do_not_collapse(trained):
    _, _, before, after = trained
    assert after>.1*before

# --- sizes and errors
def block(dim, head=64, state=16, expand=2, conv=4):
    inner,heads = expand*dim,expand*dim//head
    return dim*(2*inner+2*state+heads)+inner*dim+inner+2*((inner+2*state)*(conv+1)+3*heads)
def count(vec, dim, depth, cond, prompt_depth=2, parts=2, self_cond=True, **kw):
    steer = dim+(cond+1)*parts*dim
    encoder = (vec+1)*dim+prompt_depth*(dim+block(dim, **kw))+dim+(dim+1)*cond
    return ((1+self_cond)*vec+2)*dim+257*cond+(cond+1)*cond+encoder+depth*(steer+block(dim, **kw))+steer+(dim+1)*vec

@pytest.mark.parametrize('make,size', [
    (dimba_tiny, dict(vec=16, dim=48, depth=2, cond=48, prompt_depth=1, head=16, state=8)), (dimba_512, dict(vec=512, dim=512, depth=6, cond=512)),
    (dimba_130m, dict(vec=768, dim=768, depth=24, cond=768, state=128)), (dimba_1300m, dict(vec=1024, dim=2048, depth=48, cond=2048, state=128)),
    (partial(dimba, norm='additive', self_cond=False, depth=3), dict(vec=512, dim=512, depth=3, cond=256, parts=1, self_cond=False))])
def test_sizes(make, size):
    with torch.device('meta'): assert sum(p.numel() for p in make().parameters())==count(**size)

def test_times_of_positions(net):
    x,_,cond = net.demo()
    t = torch.rand(2, 16, generator=torch.Generator().manual_seed(0), dtype=F64)
    with torch.no_grad():
        assert net(x, t, **cond).shape==(2, 16, 16)
        assert torch.allclose(net(x, t[:,:1].expand(-1, 16), **cond), net(x, t[:,0], **cond), atol=1e-5)

def test_inputs_that_are_refused(net):
    x,net_t,cond = net.demo()
    features = inspect.unwrap(Dimba.features)
    for o in (x[0], x[...,:15], x[:,:0], torch.zeros(2, 16, 48)):
        with pytest.raises(ValueError, match='vectors'): features(net, o, net_t)
    with pytest.raises(ValueError, match='16 or 32'): features(net, x[...,:8], net_t)
    with pytest.raises(ValueError, match='keep is'): features(net, x, net_t, keep=cond['keep'][:,:5])
    with pytest.raises(ValueError, match='mask is'): features(net, x, net_t, mask=cond['mask'][:1])
    with pytest.raises(ValueError, match='16'): features(dimba_tiny(self_cond=False), x, net_t)
    with pytest.raises(ValueError, match='heads'): dimba_tiny(head=17)
