"Flux and the VAE against diffusers: the same numbers from the same weights, in every spelling, over random small sizes."
import inspect
import pytest, torch
from torch import nn
from diffnb.codec.vae import VAE, vae_tiny
from diffnb.core import create
from diffnb.hub import load_folder, load_single, save_folder
from diffnb.hub.flux import flux_config, vae_config
from diffnb.hub.layouts import Row, compare, dump_state, load_state
from diffnb.models.flux import Flux, flux_tiny, pack, unpack
from diffnb.models.layers import sinusoid

diffusers = pytest.importorskip('diffusers')
transformer_flux = pytest.importorskip('diffusers.models.transformers.transformer_flux')
single_file = pytest.importorskip('diffusers.loaders.single_file_utils')
F64 = torch.float64

def gen(seed=0): return torch.Generator().manual_seed(seed)
def diff(a, b): return (a-b).abs().max().item()
def randomise(net, seed=0, std=None):
    "Weights of a size that keeps activations near 1, so that no part is lost beside another."
    g = gen(seed)
    for p in net.parameters():
        n = p[0].numel() if p.ndim>1 else 1
        p.data = (std or n**-.5 if p.ndim>1 else .2)*torch.randn(p.shape, generator=g, dtype=F64).to(p)+(p.ndim==1 and bool((p==1).all()))
    return net.eval()
def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)

# --- Flux
class Clocks(nn.Module):
    "diffusers' clocks run in float32; these in float64, where a comparison to 1e-10 is wanted."
    def forward(self, t): return sinusoid(t.double(), 256)

class Turns(nn.Module):
    "diffusers' rotary table ends in float32; the same in float64."
    def __init__(self, axes):
        super().__init__()
        self.axes = axes
    def forward(self, ids):
        a = [ids[:,i,None].double()*10_000.**(-torch.arange(0, d, 2, dtype=F64)/d) for i,d in enumerate(self.axes)]
        a = torch.cat(a, -1).repeat_interleave(2, -1)
        return a.cos(), a.sin()

def turned(x, table, sequence_dim):
    "diffusers rounds questions and keys to float32 before it turns them; not so here."
    cos, sin = (o[:,None] for o in table)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x*cos+torch.stack([-b, a], -1).flatten(-2)*sin

TINY = dict(in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=32, num_attention_heads=2,
            joint_attention_dim=40, pooled_projection_dim=24, guidance_embeds=True, axes_dims_rope=(8,12,12)) # spec 4, check 2
FLUXES = [TINY, {**TINY, 'guidance_embeds': False, 'num_attention_heads': 3, 'axes_dims_rope': (4,8,20)},
          {**TINY, 'in_channels': 8, 'out_channels': 4, 'num_layers': 1, 'num_single_layers': 1, 'attention_head_dim': 16, 'axes_dims_rope': (2,6,8)},
          {**TINY, 'in_channels': 64, 'num_layers': 0, 'num_single_layers': 2, 'joint_attention_dim': 8, 'num_attention_heads': 1}]

def pair(config, dtype, seed=0):
    "Theirs with random weights, and ours loaded from it."
    ref = diffusers.FluxTransformer2DModel(**config)
    ref = randomise(nn.Module.to(ref, dtype), seed) # its own `to` only adds a warning
    if dtype==F64: ref.time_text_embed.time_proj, ref.pos_embed = Clocks(), Turns(config['axes_dims_rope'])
    net = flux_config().ours(dict(ref.config)).to(dtype).eval()
    report = load_state(net, ref.state_dict(), 'flux_diffusers')
    assert not report.missing and not report.unexpected
    return ref, net

def both(ref, net, dtype, h=8, w=12, words=5, seed=1):
    "The same inputs in both; `(ours, theirs)`."
    g, n = gen(seed), h*w//4
    x = torch.randn(2, net.ch, h, w, generator=g).to(dtype)
    ctx, vec = torch.randn(2, words, net.txt_in.in_features, generator=g).to(dtype), torch.randn(2, 24, generator=g).to(dtype)
    t, guidance = torch.tensor([.3, .9], dtype=dtype), torch.tensor([3.5, 2.], dtype=dtype)
    cond = dict(ctx=ctx, vec=vec, guidance=guidance)
    if net.extra: cond['concat'] = torch.randn(2, net.extra, h, w, generator=g).to(dtype)
    ids = diffusers.FluxPipeline._prepare_latent_image_ids(1, h//2, w//2, 'cpu', dtype)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        if dtype==F64: patch.setattr(transformer_flux, 'apply_rotary_emb', turned)
        theirs = ref(pack(torch.cat([x, cond['concat']], 1) if net.extra else x), encoder_hidden_states=ctx, pooled_projections=vec,
                     timestep=t, guidance=guidance if net.guidance else None, img_ids=ids, txt_ids=torch.zeros(words, 3, dtype=dtype)).sample
        assert theirs.shape[1]==n
        return net(x, t, **cond), unpack(theirs, (h//2, w//2))

@pytest.mark.parametrize('i', range(len(FLUXES)))
def test_flux_parity(i):
    "Spec 4, check 2, and other sizes: 1e-5 in float32 (of the output's size), 1e-10 in float64."
    for dtype,tol in ((torch.float32, 1e-5), (F64, 1e-10)):
        ours, theirs = both(*pair(FLUXES[i], dtype, i), dtype)
        assert theirs.std()>.1 and diff(ours, theirs)<tol*max(1, theirs.abs().max().item()), diff(ours, theirs)

def test_flux_parity_of_another_grid():
    ref, net = pair(TINY, F64)
    for h,w,words in ((2, 2, 1), (12, 4, 9)): assert diff(*both(ref, net, F64, h, w, words))<1e-10

def test_parity_sees_exchanged_halves():
    "The check that the parity test can fail: without the exchange all shapes agree, and the outputs do not."
    ref, net = pair(TINY, F64)
    from diffnb.hub.flux import flux_diffusers
    wrong = [Row(r.ours, r.theirs) if r.ours=='mod' else r for r in flux_diffusers(net)]
    load_state(net, ref.state_dict(), wrong)
    assert diff(*both(ref, net, F64))>1e-2

@pytest.fixture(scope='module')
def bfl_converter():
    "diffusers' converter of BFL's files, which knows one width only, for the width of the small network."
    src = inspect.getsource(single_file.convert_flux_transformer_checkpoint_to_diffusers)
    assert src.count('inner_dim = 3072')==1
    space = {**vars(single_file)}
    exec(src.replace('inner_dim = 3072', 'inner_dim = checkpoint["img_in.weight"].shape[0]'), space)
    return space['convert_flux_transformer_checkpoint_to_diffusers']

@pytest.mark.parametrize('i', [0, 1])
def test_bfl_through_their_converter(bfl_converter, i):
    "Ours, as BFL spell it, through diffusers' converter, is ours as diffusers spell it: names, bits and outputs."
    ref, net = pair(FLUXES[i], torch.float32, i)
    bfl = dump_state(net, 'flux_bfl')
    assert same(bfl_converter(dict(bfl)), dump_state(net, 'flux_diffusers'))
    again = flux_config().ours(dict(ref.config)).eval()
    assert load_state(again, bfl).layout=='flux_bfl' # found by itself
    assert diff(*both(ref, again, torch.float32))<1e-4

def test_bfl_names():
    "Spec 4.4."
    names = {k.rsplit('.', 1)[0] for k in dump_state(flux_tiny(), 'flux_bfl')}
    double = [f'{s}_{o}' for s in ('img', 'txt') for o in ('mod.lin', 'attn.qkv', 'attn.proj', 'attn.norm.query_norm', 'attn.norm.key_norm', 'mlp.0', 'mlp.2')]
    single = ['linear1', 'linear2', 'modulation.lin', 'norm.query_norm', 'norm.key_norm']
    assert names=={'img_in', 'txt_in', *(f'{a}_in.{b}_layer' for a in ('time', 'vector', 'guidance') for b in ('in', 'out')),
                   *(f'double_blocks.0.{o}' for o in double), *(f'single_blocks.{i}.{o}' for i in (0, 1) for o in single),
                   'final_layer.linear', 'final_layer.adaLN_modulation.1'}

@pytest.mark.parametrize('name', ['flux_bfl', 'flux_diffusers'])
def test_flux_there_and_back(name):
    net, again = randomise(flux_tiny()), flux_tiny()
    load_state(again, dump_state(net, name), name)
    assert same(net.state_dict(), again.state_dict())

def test_swap_round_trips():
    "Spec 4, check 6: scale|shift there, shift|scale here."
    net = randomise(flux_tiny())
    a, b = (dump_state(net, o) for o in ('flux_diffusers', 'flux_bfl'))
    for leaf in ('weight', 'bias'):
        theirs, ours = a[f'norm_out.linear.{leaf}'], b[f'final_layer.adaLN_modulation.1.{leaf}']
        assert torch.equal(theirs, torch.cat(ours.chunk(2)[::-1])) and torch.equal(ours, getattr(net.mod, leaf).data)

@pytest.mark.parametrize('name,n', [('flux_dev', 1160), ('flux_schnell', 1156)])
def test_published_flux_tensors(name, n):
    "Spec 4, check 1: names and shapes are those of diffusers' class."
    with torch.device('meta'):
        net = create(name)
        ref = diffusers.FluxTransformer2DModel(guidance_embeds=name=='flux_dev')
    got = {k: v.shape for k,v in dump_state(net, 'flux_diffusers').items()}
    assert len(got)==n and got=={k: v.shape for k,v in ref.state_dict().items()}

def test_prefixed_single_file(tmp_path):
    "Some distributions put `model.diffusion_model.` before BFL's names."
    from safetensors.torch import save_file
    net, again = randomise(flux_tiny()), flux_tiny()
    save_file({f'model.diffusion_model.{k}': v for k,v in dump_state(net, 'flux_bfl').items()}, tmp_path/'f.safetensors')
    load_single(again, tmp_path/'f.safetensors')
    assert same(net.state_dict(), again.state_dict())

def test_flux_folders_both_ways(tmp_path):
    ref, net = pair(TINY, torch.float32)
    ref.save_pretrained(tmp_path/'theirs')
    assert same(load_folder(tmp_path/'theirs').state_dict(), net.state_dict())
    save_folder(net, tmp_path/'ours', 'flux_diffusers')
    opened = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path/'ours')
    assert same(opened.state_dict(), ref.state_dict()) and diff(*both(opened, net, torch.float32))<1e-4

# --- the VAE
AE = dict(block_out_channels=(16,32), down_block_types=('DownEncoderBlock2D',)*2, up_block_types=('UpDecoderBlock2D',)*2,
          layers_per_block=2, norm_num_groups=8, latent_channels=4) # spec 3, check 4
def ae(*widths, **kw):
    n = len(widths)
    return {**AE, 'block_out_channels': widths, 'down_block_types': ('DownEncoderBlock2D',)*n, 'up_block_types': ('UpDecoderBlock2D',)*n, **kw}
AES = [AE, ae(8, 16, 16, layers_per_block=1, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=.3611, shift_factor=.1159),
       ae(12, norm_num_groups=4, latent_channels=2, scaling_factor=.5), ae(8, 24, 16, norm_num_groups=2, layers_per_block=3, latent_channels=3)]

def vae_pair(config, dtype, seed=0):
    ref = randomise(diffusers.AutoencoderKL(**config).to(dtype), seed)
    net = vae_config().ours(dict(ref.config)).to(dtype)
    load_state(net, ref.state_dict(), 'vae_diffusers')
    return ref, net

def test_tiny_vae_count():
    ref, net = vae_pair(AE, torch.float32)
    assert sum(p.numel() for p in net.parameters())==214_615

@pytest.mark.parametrize('i', range(len(AES)))
def test_vae_parity(i):
    "Spec 3, checks 4 and 6: moments, latents and pictures; 1e-5 in float32, 1e-10 in float64."
    for dtype,tol in ((torch.float32, 1e-5), (F64, 1e-10)):
        ref, net = vae_pair(AES[i], dtype, i)
        x = torch.rand(2, 3, 16, 24, generator=gen(7)).to(dtype)
        with torch.no_grad():
            post = ref.encode(2*x-1).latent_dist
            m, z = net.moments(x), net.encode(x)
            c = ref.config
            want = (post.mean-(c.shift_factor or 0))*c.scaling_factor
            assert diff(m, post.parameters)<tol*post.parameters.abs().max() and diff(z, want)<tol*want.abs().max()
            shape, scale = (2, c.latent_channels, 6, 4), max(1, c.scaling_factor)
            z = torch.randn(shape, generator=gen(8)).to(dtype)*scale
            theirs = ref.decode(z/c.scaling_factor+(c.shift_factor or 0)).sample
            assert theirs.std()>.1 and diff(net.images(z), theirs)<tol*max(1, theirs.abs().max().item())
            assert diff(net.decode(z).double(), ((theirs.clamp(-1, 1)+1)*127.5).double())<=.5+1e-3 # bytes: rounded

def test_published_scales():
    for name,scale,shift in (('sd_vae', .18215, 0), ('sdxl_vae', .13025, 0), ('flux_vae', .3611, .1159)):
        with torch.device('meta'): v = create(name, kind='codec')
        m = torch.ones(1, 2*v.z, 1, 1)
        assert torch.allclose(v.latents(m), torch.full((1, v.z, 1, 1), (1-shift)*scale))

@pytest.mark.parametrize('name,n,kw', [('sd_vae', 248, {}), ('flux_vae', 244, dict(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False))])
def test_published_vae_tensors(name, n, kw):
    with torch.device('meta'):
        net = create(name, kind='codec')
        ref = diffusers.AutoencoderKL(**{**ae(128, 256, 512, 512, norm_num_groups=32), **kw})
    got = {k: v.shape for k,v in dump_state(net, 'vae_diffusers').items()}
    assert len(got)==n and got=={k: v.shape for k,v in ref.state_dict().items()}
    total, parts = sum(p.numel() for p in net.parameters()), [sum(p.numel() for k,p in m.named_parameters() if 'quant' not in k) for m in (net.encoder, net.decoder)]
    assert (total, *parts)==({'sd_vae': (83_653_863, 34_163_592, 49_490_179), 'flux_vae': (83_819_683, 34_274_208, 49_545_475)}[name])

@pytest.mark.parametrize('i', [0, 1, 3])
def test_ldm_through_their_converter(i):
    "Ours, as CompVis spell it, through diffusers' converter, is ours as diffusers spell it; with and without a prefix."
    ref, net = vae_pair(AES[i], torch.float32, i)
    ldm = dump_state(net, 'vae_ldm')
    want = dump_state(net, 'vae_diffusers')
    for prefix in ('', 'first_stage_model.'):
        theirs = single_file.convert_ldm_vae_checkpoint({prefix+k: v for k,v in ldm.items()}, dict(ref.config))
        assert same(theirs, want) and same(theirs, ref.state_dict())

def test_ldm_names():
    "Spec 3.5: reversed order of the decoder's stages, convolutions in the attention."
    s = dump_state(create('vae', kind='codec', widths=[8, 16], groups=8, layers=1), 'vae_ldm')
    assert s['encoder.mid.attn_1.q.weight'].shape==(16, 16, 1, 1) and s['decoder.mid.attn_1.proj_out.weight'].shape==(16, 16, 1, 1)
    assert s['decoder.up.1.block.0.conv1.weight'].shape==(16, 16, 3, 3) and s['decoder.up.0.block.0.conv1.weight'].shape==(8, 16, 3, 3)
    assert {'encoder.down.0.downsample.conv.weight', 'decoder.up.1.upsample.conv.bias', 'encoder.down.1.block.0.nin_shortcut.weight',
            'encoder.norm_out.weight', 'decoder.conv_in.weight', 'quant_conv.weight', 'post_quant_conv.weight'}<=s.keys()

@pytest.mark.parametrize('name', ['vae_diffusers', 'vae_diffusers_old', 'vae_ldm'])
@pytest.mark.parametrize('quant', [True, False])
def test_vae_there_and_back(name, quant):
    net, again = randomise(vae_tiny(quant=quant)), vae_tiny(quant=quant)
    assert load_state(again, dump_state(net, name)).layout==name
    assert same(net.state_dict(), again.state_dict())

def test_old_names(tmp_path):
    "diffusers still reads query/key/value/proj_attn, and so do we."
    ref, net = vae_pair(AE, torch.float32)
    ref.save_pretrained(tmp_path/'old')
    from safetensors.torch import load_file as read, save_file
    f = tmp_path/'old'/'diffusion_pytorch_model.safetensors'
    old = {'to_q': 'query', 'to_k': 'key', 'to_v': 'value', 'to_out.0': 'proj_attn'}
    def rename(k): return next((k.replace(f'.{a}.', f'.{b}.') for a,b in old.items() if f'.{a}.' in k), k)
    state = {rename(k): v for k,v in read(f).items()}
    assert sum('proj_attn' in k for k in state)==4
    save_file(state, f, metadata={'format': 'pt'})
    assert same(diffusers.AutoencoderKL.from_pretrained(tmp_path/'old').state_dict(), ref.state_dict())
    assert same(load_folder(tmp_path/'old').state_dict(), net.state_dict())
    assert same(dump_state(net, 'vae_diffusers_old'), state)

def test_inside_a_single_file(tmp_path):
    "Stable Diffusion's single file: the autoencoder under its prefix, other networks beside it."
    from safetensors.torch import save_file
    net, again = randomise(vae_tiny()), vae_tiny()
    state = {f'first_stage_model.{k}': v for k,v in dump_state(net, 'vae_ldm').items()}
    save_file({**state, 'model.diffusion_model.out.2.bias': torch.zeros(4), 'betas': torch.zeros(3)}, tmp_path/'sd.safetensors')
    load_single(again, tmp_path/'sd.safetensors')
    assert same(net.state_dict(), again.state_dict())

@pytest.mark.parametrize('i', [0, 1])
def test_vae_folders_both_ways(tmp_path, i):
    ref, net = vae_pair(AES[i], torch.float32, i)
    ref.save_pretrained(tmp_path/'theirs')
    loaded = load_folder(tmp_path/'theirs')
    assert same(loaded.state_dict(), net.state_dict()) and loaded.sizes==net.sizes
    save_folder(net, tmp_path/'ours', 'vae_diffusers')
    opened = diffusers.AutoencoderKL.from_pretrained(tmp_path/'ours')
    assert same(opened.state_dict(), ref.state_dict())
    assert (opened.config.scaling_factor, opened.config.shift_factor)==(ref.config.scaling_factor, ref.config.shift_factor)

# --- configurations
@pytest.mark.parametrize('i', range(len(FLUXES)))
def test_flux_configs(i):
    "Theirs -> ours -> theirs says the same, and a fresh class of theirs understands it."
    config = dict(diffusers.FluxTransformer2DModel(**FLUXES[i]).config)
    net = flux_config().ours(config)
    back = flux_config().theirs(net)
    assert {**back, 'out_channels': back['out_channels'] if config['out_channels'] else None, 'axes_dims_rope': tuple(back['axes_dims_rope'])}== \
        {k: v for k,v in config.items() if not k.startswith('_')}
    assert flux_config().ours(back).sizes==net.sizes and net.preset['name']=='flux'

@pytest.mark.parametrize('change,words', [
    (dict(patch_size=2), 'patch_size is 2'), (dict(in_channels=18), 'in_channels 18'), (dict(out_channels=32), 'out_channels 32'),
    (dict(axes_dims_rope=(8, 8, 8)), 'add up'), (dict(num_layer=3), "'num_layer' is unknown here .did you mean 'num_layers'")])
def test_flux_configs_that_are_refused(change, words):
    with pytest.raises(ValueError, match=words): flux_config().ours({**TINY, **change})

@pytest.mark.parametrize('change,words', [
    (dict(act_fn='relu'), 'act_fn'), (dict(latents_mean=[0.]), 'latents_mean'), (dict(mid_block_add_attention=False), 'mid_block_add_attention'),
    (dict(use_post_quant_conv=False), 'use_post_quant_conv'), (dict(out_channels=4), 'out_channels'), (dict(norm_num_groups=5), 'groups'),
    (dict(down_block_types=('DownEncoderBlock2D', 'AttnDownEncoderBlock2D')), 'down_block_types'),
    (dict(up_block_types=('UpDecoderBlock2D',)), 'up_block_types'), (dict(scale_factor=1.), "did you mean 'scaling_factor'")])
def test_vae_configs_that_are_refused(change, words):
    with pytest.raises(ValueError, match=words): vae_config().ours({**AE, **change})

def test_what_theirs_cannot_say():
    with pytest.raises(ValueError, match='MLPs of 4 times'): flux_config().theirs(Flux(4, dim=32, heads=2, doubles=1, singles=1, ctx=8, vec=8, axes=(4, 6, 6), mlp=2.))

def test_wrong_layouts_are_told():
    net = flux_tiny()
    with pytest.raises(ValueError, match='layout of VAE'): compare(net, {}, 'vae_ldm')
    state = dump_state(net, 'flux_diffusers')
    state['norm_out.linear.weight'] = state['norm_out.linear.weight'][1:]
    with pytest.raises(ValueError, match='mod.weight'): load_state(net, state, 'flux_diffusers')
    assert isinstance(vae_tiny(), VAE)

def test_published_configs():
    "The files that lie beside the published weights, from which the presets' sizes follow."
    flux_dev = {'_class_name': 'FluxTransformer2DModel', '_diffusers_version': '0.30.0.dev0', 'attention_head_dim': 128, 'guidance_embeds': True,
                'in_channels': 64, 'joint_attention_dim': 4096, 'num_attention_heads': 24, 'num_layers': 19, 'num_single_layers': 38, 'patch_size': 1,
                'pooled_projection_dim': 768}
    n = 4
    ae = dict(act_fn='silu', block_out_channels=[128, 256, 512, 512], down_block_types=['DownEncoderBlock2D']*n, in_channels=3, out_channels=3,
              layers_per_block=2, norm_num_groups=32, up_block_types=['UpDecoderBlock2D']*n)
    with torch.device('meta'):
        for config,want in ((flux_dev, 'flux_dev'), ({**flux_dev, 'guidance_embeds': False}, 'flux_schnell')):
            assert flux_config().ours(config).sizes==create(want).sizes
        fill = {**flux_dev, 'in_channels': 384, 'out_channels': 64, 'axes_dims_rope': [16, 56, 56]}
        assert flux_config().ours(fill).sizes==create('flux_dev', extra=80).sizes
        sd = {**ae, 'latent_channels': 4, 'sample_size': 512}
        xl = {**ae, 'latent_channels': 4, 'sample_size': 1024, 'force_upcast': True, 'scaling_factor': .13025}
        flux = {**ae, 'latent_channels': 16, 'sample_size': 1024, 'force_upcast': True, 'scaling_factor': .3611, 'shift_factor': .1159,
                'use_quant_conv': False, 'use_post_quant_conv': False, 'latents_mean': None, 'latents_std': None, 'mid_block_add_attention': True}
        for config,want in ((sd, 'sd_vae'), (xl, 'sdxl_vae'), (flux, 'flux_vae')):
            assert vae_config().ours(config).sizes==create(want, kind='codec').sizes
