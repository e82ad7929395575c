"Training with conditions: Stable Diffusion's kinds and FLUX.1's learn from captions, step for step as by hand; text encoders and ControlNets too."
from functools import cache, partial
import pytest, torch
from torch import nn
from diffnb.core import Denoiser, Feats, create, mean_loss
from diffnb.data.images import batches, emoji, floats
from diffnb.process.gaussian import Gaussian
from diffnb.rng import Rng
from diffnb.schedules import zero_snr
from diffnb.store import load_tensors
from diffnb.train.checkpoint import load_weights
from diffnb.train.ema import halflife
from diffnb.train.loop import fit
from diffnb.train.task import DiffusionTask, adam, constant
from diffnb.weights import later, logit_normal, min_snr
pytest.importorskip('diffusers'); pytest.importorskip('transformers')
import diffusers, folders
from diffusers.training_utils import compute_snr
from diffnb.conditioners import last, load_text
from diffnb.hub.pipelines import load_pipeline
from diffnb.models.controlnet import controlled

SAID = ['a red cube', 'a cat', 'three dots', 'be']
KEYED = dict(optimiser=adam(), lr=constant(3e-3), drop=.2)
def gen(seed=0): return torch.Generator().manual_seed(seed)
def rng(step=0): return Rng(0).at('train', step=step)

@pytest.fixture(scope='module')
def at(tmp_path_factory):
    "Folders by name, each made once."
    return cache(lambda name: getattr(folders, name)(tmp_path_factory.mktemp('told')/name))

Z = torch.randn(4, 4, 1, 1, generator=gen(7)).sign().expand(4, 4, 8, 8) # what each caption looks like: a colour
def told(kind, start=0, size=8):
    "Latents that the caption decides; what XL and FLUX.1 read besides."
    for n in range(start, 10**6, size):
        idx = torch.arange(n, n+size)
        k = Rng(1, 'which').of(idx).integers(4, size)
        cond = {'text': [SAID[i] for i in k.tolist()]}
        if kind=='xl': cond['ids'] = torch.tensor([16, 16, 0, 0, 16, 16])+4*k[:,None]
        if kind=='flux': cond['guidance'] = 1.+k.float()
        yield dict(z=Z[k], idx=idx, cond=cond)

def learner(path, kind, process, **kw):
    p = load_pipeline(path)
    return DiffusionTask(p.denoiser.requires_grad_(), process, conditioner=p.conditioner, **{**KEYED, **kw})

EPS, V = (Gaussian('scaled_linear', o) for o in ('eps', 'v'))
LATE = dict(times=later(.3, 3.)) # where the captions tell what the latents do not
KINDS = {'eps': ('sd', EPS, LATE), 'v': ('sd', V, {}), 'eps, min-SNR': ('sd', Gaussian('scaled_linear', 'eps', min_snr()), LATE),
         'v, min-SNR, biased': ('sd', Gaussian('scaled_linear', 'v', min_snr()), LATE), 'zero SNR': ('sd', Gaussian(zero_snr(), 'v'), LATE),
         'xl': ('xl', V, LATE), 'flux': ('flux', Gaussian('straight', 'flow'), dict(times=logit_normal(1.5), lr=constant(5e-3)))}

@pytest.mark.parametrize('name', KINDS)
def test_captions_are_learned(at, name):
    "A few dozen steps: the loss falls, and with the captions of others it is larger (of eps little depends on the words)."
    kind, process, kw = KINDS[name]
    task = learner(at(kind), kind, process, **kw)
    batch = {**next(told(kind, 5000, 32)), 't': process.schedule.snap(torch.linspace(.7, 1, 32, dtype=torch.float64))}
    others = {**batch, 'cond': {**batch['cond'], 'text': [SAID[SAID.index(o)-1] for o in batch['cond']['text']]}}
    @torch.no_grad()
    def loss(b): return mean_loss(task.loss(b, rng())).item()
    before = loss(batch)
    fit(task, partial(told, kind), 60, averages={}, bar=False, log_every=40)
    assert loss(batch)<.8*before and loss(others)>(1.003 if process.pred.name=='eps' else 1.03)*loss(batch)

# --- by hand, as diffusers' scripts do it ---
def encoded(path, texts, dropped):
    "SD's words; the empty text for those who go without."
    tok, enc = (c.from_pretrained(path/f) for c,f in ((folders.transformers.CLIPTokenizer, 'tokenizer'), (folders.transformers.CLIPTextModel, 'text_encoder')))
    ids = tok(['' if d else o for o,d in zip(texts, dropped)], padding='max_length', truncation=True, max_length=12, return_tensors='pt').input_ids
    return enc(ids)[0]

def drawn(task, kind):
    "A batch, its noise, and which of it is dropped: some and not all."
    b = task.draw(next(told(kind)), rng())
    assert 0<b['drop'].sum()<8
    return b, rng().of(b['idx']).at('noise').at('corrupt').normal(like=b['z']), b['drop']

def agree(task, b, pred, target, weight, ours, theirs):
    "The same loss, and the same gradient of the first layer."
    mine = mean_loss(task.loss(b, rng()))
    hand = (weight*(pred-target).square().mean((1, 2, 3) if pred.ndim==4 else (1, 2))).mean()
    assert abs(mine-hand)<1e-4*hand
    mine.backward(); hand.backward()
    a, b = (o.grad.flatten() for o in (ours, theirs))
    assert (a-b).abs().max()<1e-3*b.abs().max()

@pytest.mark.parametrize('pred,how', [('eps', 'plain'), ('v', 'plain'), ('eps', 'min-SNR'), ('v', 'min-SNR'), ('v', 'zero SNR')])
def test_sd_by_hand(at, pred, how):
    path, zero = at('sd'), how=='zero SNR'
    process = Gaussian(zero_snr() if zero else 'scaled_linear', pred, min_snr() if how=='min-SNR' else None)
    task = learner(path, 'sd', process, drop=.5)
    b, eps, drop = drawn(task, 'sd')
    noising = diffusers.DDPMScheduler(**folders.BETAS, rescale_betas_zero_snr=zero)
    i = (1000*b['t']-1).round().long()
    target, snr = eps if pred=='eps' else noising.get_velocity(b['z'], eps, i), compute_snr(noising, i)
    w = torch.ones(8) if how!='min-SNR' else snr.clamp(max=5)/(snr if pred=='eps' else snr+1)
    unet = diffusers.UNet2DConditionModel.from_pretrained(path/'unet')
    out = unet(noising.add_noise(b['z'], eps, i), i, encoded(path, b['cond']['text'], drop)).sample
    agree(task, b, out, target, w, task.denoiser.enc.stem.weight, unet.conv_in.weight)

def test_xl_by_hand(at):
    "Both encoders' last layer but one, the second's vector, the six numbers; those who go without get zeros, and keep the numbers."
    path, lib = at('xl'), folders.transformers
    task = learner(path, 'xl', EPS, drop=.5)
    b, eps, drop = drawn(task, 'xl')
    words, vec = [], None
    for two,cls in (('', lib.CLIPTextModel), ('_2', lib.CLIPTextModelWithProjection)):
        tok, enc = lib.CLIPTokenizer.from_pretrained(path/f'tokenizer{two}'), cls.from_pretrained(path/f'text_encoder{two}')
        o = enc(tok(b['cond']['text'], padding='max_length', truncation=True, max_length=12, return_tensors='pt').input_ids, output_hidden_states=True)
        words.append(o.hidden_states[-2])
        vec = getattr(o, 'text_embeds', vec)
    stay = (~drop).float()
    noising, i = diffusers.DDPMScheduler(**folders.BETAS), (1000*b['t']-1).round().long()
    unet = diffusers.UNet2DConditionModel.from_pretrained(path/'unet')
    more = dict(text_embeds=vec*stay[:,None], time_ids=b['cond']['ids'])
    out = unet(noising.add_noise(b['z'], eps, i), i, torch.cat(words, -1)*stay[:,None,None], added_cond_kwargs=more).sample
    agree(task, b, out, eps, 1., task.denoiser.enc.stem.weight, unet.conv_in.weight)

def test_flux_by_hand(at):
    "Rectified flow on packed latents, with the guidance weight as an input."
    path, lib, Pipe = at('flux'), folders.transformers, diffusers.FluxPipeline
    task = learner(path, 'flux', Gaussian('straight', 'flow'), times=logit_normal(), drop=.5)
    b, eps, drop = drawn(task, 'flux')
    said = ['' if d else o for o,d in zip(b['cond']['text'], drop)]
    def ids(two, cls, n): return cls.from_pretrained(path/f'tokenizer{two}')(said, padding='max_length', truncation=True, max_length=n, return_tensors='pt').input_ids
    vec = lib.CLIPTextModel.from_pretrained(path/'text_encoder')(ids('', lib.CLIPTokenizer, 12)).pooler_output
    ctx = lib.T5EncoderModel.from_pretrained(path/'text_encoder_2')(ids('_2', lib.T5Tokenizer, 512))[0]
    t = b['t'].float()[:,None,None,None]
    def pack(x): return Pipe._pack_latents(x, 8, 4, 8, 8)
    net = diffusers.FluxTransformer2DModel.from_pretrained(path/'transformer')
    out = net(hidden_states=pack((1-t)*b['z']+t*eps), encoder_hidden_states=ctx, pooled_projections=vec, timestep=b['t'].float(), guidance=b['cond']['guidance'],
              img_ids=Pipe._prepare_latent_image_ids(8, 4, 4, 'cpu', torch.float32), txt_ids=torch.zeros(ctx.shape[1], 3)).sample
    agree(task, b, out, pack(eps-b['z']), 1., task.denoiser.img_in.weight, net.x_embedder.weight)

# --- the text encoder: part of what is trained, or not ---
def with_encoder(path, learn):
    torch.manual_seed(0)
    enc = load_text(path/'text_encoder', dict(ctx=last), tokens=path/'tokenizer', learn=learn)
    return DiffusionTask(create('sd_unet_tiny'), EPS, conditioner=enc, **KEYED)

def bits(run):
    out = {f'net/{k}': v for k,v in run.task.net.state_dict().items()}
    out |= {f'{n}/{k}': v for n,e in run.emas.items() for k,v in e.avg.items()}
    return out | {f'opt/{i}/{k}': v for i,s in enumerate(run.opt.state.values()) for k,v in s.items()}
def same(a, b): return a.keys()==b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())

@pytest.mark.parametrize('learn', [False, True])
def test_resumed_with_an_encoder(at, tmp_path, learn):
    "10 = 5+5 bit for bit; an encoder that learns is trained, averaged and saved with the rest, a frozen one stays as it was."
    def go(n, folder=None): return fit(with_encoder(at('sd'), learn), partial(told, 'sd'), n, folder, averages=dict(ema=halflife(30)), bar=False)
    whole, fresh = go(10), with_encoder(at('sd'), learn)
    for n in (5, 10): run = go(n, tmp_path/'run')
    assert same(bits(run), bits(whole))
    parts = {k.split('.')[0] for k in run.emas['ema'].avg}
    assert (run.task.net is run.task.denoiser)!=learn and ('conditioner' in parts)==learn
    was, now = (o.conditioner.net.state_dict() for o in (fresh, run.task))
    assert same(was, now)!=learn
    load_weights(tmp_path/'run', fresh.net)
    assert all(torch.equal(v, run.emas['ema'].avg[k]) for k,v in fresh.net.named_parameters() if v.requires_grad)
    *_, vec = fresh.conditions({'text': SAID})[0].values()
    assert vec.requires_grad==learn and not run.task.conditioner.net.training is not learn

# --- who is dropped, and what of ---
class Spy(Denoiser):
    "Remembers what it is told."
    def __init__(self):
        super().__init__()
        self.one, self.seen = nn.Parameter(torch.ones(())), []
    def features(self, x, net_t, **cond): self.seen.append({'x': x, **cond}); return Feats(x*self.one)
    def head(self, feats): return feats.h
    def null(self, x, keep=None, y=None, **cond):
        return x if keep is None else torch.where(keep, 0, x), {**cond, 'y': None if y is None else torch.full_like(y, 9)}

def spied(path, **kw): return DiffusionTask(Spy(), Gaussian('straight', 'flow'), conditioner=load_text(path/'text_encoder', dict(ctx=last), tokens=path/'tokenizer'), **kw)

def test_all_is_dropped_at_once(at):
    "Words by the conditioner; label and prompt in x, of the same samples, by the network."
    task, b = spied(at('sd'), drop=.5), next(told('sd'))
    b = task.draw({**b, 'cond': {**b['cond'], 'y': torch.arange(8)}, 'keep': torch.ones(8, 4, 8, 8, dtype=torch.bool)}, rng())
    task.loss(b, rng())
    seen, d = task.denoiser.seen[-1], b['drop']
    full, = task.conditions({'text': b['cond']['text']})[0].values()
    empty, = task.conditions({'text': ['']})[0].values()
    assert 0<d.sum()<8 and (full-empty).abs().amax((1, 2)).min()>1e-3
    assert torch.allclose(seen['ctx'], torch.where(d[:,None,None], empty, full), atol=1e-5)
    assert torch.equal(seen['y'], torch.where(d, 9, torch.arange(8))) and torch.equal(seen['x']==0, d[:,None,None,None].expand_as(b['z']))
    assert 'text' not in seen

def test_drop_nothing_or_all(at):
    path = at('sd')
    for p,who in ((0, None), (1., [True]*8)):
        task = spied(path, drop=p)
        d = task.draw(next(told('sd')), rng()).get('drop')
        assert d is None if who is None else d.tolist()==who

@pytest.mark.parametrize('text,why', [(['a']*7+[b'x'], 'text 7 of 8 is b'), (['a']*7+[3], 'text 7 of 8 is 3'), ('a cat', 'text is a list'), (['\ud83d']*8, 'half a character'),
                                      (None, 'the conditions are none, and text is needed')])
def test_bad_captions(at, text, why):
    "One line, before the network is asked."
    task = spied(at('sd'), drop=.5)
    cond = {} if text is None else {'text': text}
    with pytest.raises(ValueError, match=why): task.loss({**next(told('sd')), 'cond': cond}, rng())
    assert not task.denoiser.seen

def test_an_encoder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match='gone'): load_text(tmp_path/'gone', dict(ctx=last))

def test_frozen_parts_follow_the_network(at):
    enc = load_text(at('sd')/'text_encoder', dict(ctx=last), tokens=at('sd')/'tokenizer')
    DiffusionTask(create('sd_unet_tiny').to('meta'), EPS, conditioner=enc)
    assert {p.device.type for p in enc.parameters()}=={'meta'}

def test_labels_alone():
    "A set with captions, a network that reads labels, and no conditioner: the captions reach nobody."
    task = DiffusionTask(create('diffit_tiny', size=32, patch=4, classes=9), Gaussian('straight', 'flow'), drop=.5)
    b = next(batches(emoji('test'), 6, Rng(0), transforms=[floats]))
    assert set(b['cond'])=={'y', 'text'} and [set(o) for o in task.conditions(b['cond'])]==[set(), {'y'}]
    run = fit(task, partial(batches, emoji('test'), 6, Rng(0), transforms=[floats]), 2, averages={}, bar=False, accumulate=2)
    assert run.last.ok

# --- ControlNet ---
def with_control(path):
    torch.manual_seed(0)
    net = controlled(create('sd_unet_tiny').requires_grad_(False), 3, (4,8))
    return DiffusionTask(net, EPS, conditioner=load_text(path/'text_encoder', dict(ctx=last), tokens=path/'tokenizer'), **{**KEYED, 'lr': constant(1e-2)})

def shown(start=0, size=8):
    "The picture tells what the words leave open."
    pictures = torch.rand(4, 3, 16, 16, generator=gen(2))
    for b in told('sd', start, size):
        k = torch.tensor([SAID.index(o) for o in b['cond']['text']])
        yield {**b, 'cond': {'text': ['a cat']*size, 'control': pictures[k]}}

def test_control_is_trained_alone(at, tmp_path):
    "It begins by changing nothing; then it learns, and the base does not; averages hold the copy alone; 6 = 3+3."
    task, b = with_control(at('sd')), next(shown(5000, 32))
    t = EPS.schedule.snap(torch.linspace(.3, 1, 32, dtype=torch.float64))
    plain = DiffusionTask(task.denoiser.net, EPS, conditioner=task.conditioner)
    @torch.no_grad()
    def loss(task, *left_out): return mean_loss(task.loss({**b, 't': t, 'cond': {k: v for k,v in b['cond'].items() if k not in left_out}}, rng())).item()
    before = loss(task)
    assert before==loss(plain, 'control')
    base = {k: v.clone() for k,v in task.denoiser.net.state_dict().items()}
    run = fit(task, shown, 40, averages=dict(ema=halflife(30)), bar=False, log_every=40)
    assert same(base, task.denoiser.net.state_dict()) and before==loss(plain, 'control')
    assert loss(task)<.97*before
    assert {k.split('.')[0] for k in run.emas['ema'].avg}=={'control'}
    def go(n, folder=None): return fit(with_control(at('sd')), shown, n, folder, averages=dict(ema=halflife(30)), bar=False)
    for n in (3, 6): two = go(n, tmp_path/'run')
    assert same(bits(two), bits(go(6)))
    assert {k.split('.')[0] for k in load_tensors(two.saved/'ema-ema.safetensors')[0]}=={'control'}
