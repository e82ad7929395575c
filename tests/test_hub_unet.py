"Stable Diffusion's U-Net and ControlNet against diffusers: the same numbers from the same weights, in every spelling, over random small sizes."
import inspect, json, random
import pytest, torch
from torch import nn
from safetensors.torch import save_file
from diffnb.core import create
from diffnb.hub import load_folder, load_single, save_folder, save_single
from diffnb.hub.layouts import Hollow, dump_state, load_state
from diffnb.hub.unet import control_config, unet_config
from diffnb.models.controlnet import ControlNet, control
from diffnb.models.layers import sinusoid
from diffnb.models.unet import sd_unet_tiny, unet

diffusers = pytest.importorskip('diffusers')
single_file = pytest.importorskip('diffusers.loaders.single_file_utils')
UNet2D, Control2D = diffusers.UNet2DConditionModel, diffusers.ControlNetModel
F64 = torch.float64

def gen(seed=0): return torch.Generator().manual_seed(seed)
def diff(a, b): return (a-b).abs().max().item()
def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def shapes(state): return {k: tuple(v.shape) for k,v in state.items()}
def randomise(net, seed=0):
    "Weights of a size that keeps activations near 1, so that no part is lost beside another."
    g = gen(seed)
    for p in net.parameters():
        n = p[0].numel() if p.ndim>1 else 1
        p.data = (n**-.5 if p.ndim>1 else .2)*torch.randn(p.shape, generator=g, dtype=F64).to(p)+(p.ndim==1 and bool((p==1).all()))
    return net.eval()
@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad(): yield

# --- sizes. Spec 3, checks 2 and 3; then what published networks are not, but may be
CROSS, PLAIN = 'CrossAttnDownBlock2D', 'DownBlock2D'
def config(types, **kw):
    "Options of a small U-Net whose way up mirrors its way down."
    up = [t.replace('Down', 'Up') for t in reversed(types)]
    return dict(dict(sample_size=8, block_out_channels=(32,64), down_block_types=tuple(types), up_block_types=tuple(up),
                     cross_attention_dim=24, norm_num_groups=8, attention_head_dim=4), **kw)
ADDED = dict(addition_embed_type='text_time', addition_time_embed_dim=8, projection_class_embeddings_input_dim=64)
TINY = config([CROSS, PLAIN])
TINY_XL = config([PLAIN, CROSS], attention_head_dim=[2,4], transformer_layers_per_block=[1,2], use_linear_projection=True, **ADDED)

def drawn(seed):
    "A random small configuration."
    r = random.Random(seed)
    n = r.choice([1, 2, 2, 3, 3])
    widths, heads = [r.choice([16,24,32]) for _ in range(n)], [r.choice([1,2,4]) for _ in range(n)]
    o = config([r.choice([CROSS, CROSS, PLAIN]) for _ in range(n)], block_out_channels=widths, attention_head_dim=heads,
               layers_per_block=r.choice([1, 2, 3, [r.choice([1, 2, 3]) for _ in range(n)]]),
               transformer_layers_per_block=[r.choice([1, 2]) for _ in range(n)], use_linear_projection=r.random()<.5,
               norm_num_groups=r.choice([4, 8]), norm_eps=r.choice([1e-5, 1e-6]), cross_attention_dim=r.choice([8, 20]),
               in_channels=4+r.choice([0, 5]), mid_block_type=r.choice(['UNetMidBlock2DCrossAttn']*2+['UNetMidBlock2D']))
    return {**o, **(ADDED if r.random()<.5 else {})}
CONFIGS = [TINY, TINY_XL, {**TINY, 'layers_per_block': 3, 'in_channels': 9}, *map(drawn, range(8))]

class Clocks(nn.Module):
    "diffusers' clocks run in float32; these in float64, where a comparison to 1e-10 is wanted."
    def __init__(self, dim):
        super().__init__()
        self.dim = dim
    def forward(self, t): return sinusoid(t.double(), self.dim)

def exact(ref):
    ref.time_proj = Clocks(ref.time_proj.num_channels)
    if hasattr(ref, 'add_time_proj'): ref.add_time_proj = Clocks(ref.add_time_proj.num_channels)

def pair(o, dtype=torch.float32, seed=0):
    "Theirs with random weights, and ours made from its config and loaded from it."
    ref = randomise(nn.Module.to(UNet2D(**o), dtype), seed) # its own `to` only adds a warning
    if dtype==F64: exact(ref)
    net = unet_config().ours(json.loads(json.dumps(dict(ref.config)))).to(dtype).eval()
    load_state(net, ref.state_dict(), 'diffusers')
    return ref, net

def inputs(net, dtype, size=8, seed=0):
    "Latents, times, our conditions and theirs."
    g, e = gen(seed), net.enc
    def normal(*s): return torch.randn(2, *s, generator=g, dtype=F64).to(dtype)
    x, t, cond = normal(net.ch, size, size), torch.tensor([3, 900]), dict(ctx=normal(7, e.ctx))
    kw = {}
    if e.added:
        cond |= dict(vec=normal(e.added-6*e.freqs), ids=torch.randint(1024, (2, 6), generator=g))
        kw = dict(added_cond_kwargs=dict(text_embeds=cond['vec'], time_ids=cond['ids']))
    if net.extra: cond['concat'] = normal(net.extra, size, size)
    return x, t, cond, kw
def ask(ref, x, t, cond, **kw):
    return ref(torch.cat([x, cond['concat']], 1) if 'concat' in cond else x, t, cond['ctx'], **kw).sample

@pytest.mark.parametrize('dtype,tol', [(torch.float32, 1e-5), (F64, 1e-10)], ids=['f32', 'f64'])
@pytest.mark.parametrize('i', range(len(CONFIGS)))
def test_same_output(i, dtype, tol):
    "The output; then ours -> theirs gives their tensors back, to the bit."
    ref, net = pair(CONFIGS[i], dtype, i)
    x, t, cond, kw = inputs(net, dtype, seed=i)
    want = ask(ref, x, t, cond, **kw)
    assert diff(net(x, t.to(dtype), **cond), want)<tol*max(1, want.abs().max()) and want.std()>.05
    assert same(dump_state(net, 'diffusers'), ref.state_dict())

def test_integer_and_fractional_times():
    "Our processes give times in float64, theirs compute clocks in float32: what differs is the rounding of an angle of up to 1000."
    ref, net = pair(TINY)
    x, _, cond, _ = inputs(net, torch.float32)
    for t in (0, 17, 999, 499.5):
        assert diff(net(x, torch.tensor([t], dtype=F64), **cond), ask(ref, x, torch.tensor(t), cond))<1e-5

def test_odd_sizes_and_masks():
    "Sides that cannot be halved, and words that do not exist."
    ref, net = pair(config([CROSS, PLAIN, CROSS], block_out_channels=(16,24,32), attention_head_dim=2), F64)
    for size in (9, 5, 7): # 9, 5, 3 on the way down
        x, t, cond, kw = inputs(net, F64, size)
        assert diff(net(x, t.double(), **cond), ask(ref, x, t, cond, **kw))<1e-10
    mask = torch.arange(7)[None]<torch.tensor([[4],[7]])
    got = net(x, t.double(), **cond, ctx_mask=mask)
    assert diff(got, ask(ref, x, t, cond, encoder_attention_mask=mask, **kw))<1e-10

def test_spec_counts():
    for o,n in ((TINY, 1_102_628), (TINY_XL, 1_913_028)):
        assert sum(p.numel() for p in unet_config().ours(o).parameters())==n

# --- published networks
SD = dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
SD21 = dict(sample_size=96, cross_attention_dim=1024, attention_head_dim=[5,10,20,20], use_linear_projection=True, upcast_attention=True)
SDXL = dict(sample_size=128, block_out_channels=[320,640,1280], down_block_types=[PLAIN, CROSS, CROSS], cross_attention_dim=2048,
            up_block_types=['CrossAttnUpBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'], transformer_layers_per_block=[1,2,10],
            attention_head_dim=[5,10,20], use_linear_projection=True, addition_embed_type='text_time', addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816)
REFINER = dict(sample_size=128, block_out_channels=[384,768,1536,1536], down_block_types=[PLAIN, CROSS, CROSS, PLAIN],
               up_block_types=['UpBlock2D', 'CrossAttnUpBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'], transformer_layers_per_block=4,
               attention_head_dim=[6,12,24,24], cross_attention_dim=1280, use_linear_projection=True, addition_embed_type='text_time',
               addition_time_embed_dim=256, projection_class_embeddings_input_dim=2560)
NAMES = {'sd15_unet': (SD, 686), 'sd21_unet': (SD21, 686), 'sdxl_unet': (SDXL, 1680), None: (REFINER, None)}

@pytest.mark.parametrize('name', NAMES)
def test_published(name):
    "Names and shapes of all tensors are diffusers'; the preset and the config make the same network, and the config comes back."
    o, n = NAMES[name]
    with torch.device('meta'):
        ref = UNet2D(**o)
        net = unet_config().ours(dict(ref.config))
        want = shapes(ref.state_dict())
        assert shapes(dump_state(net, 'diffusers'))==want and n in (None, len(want))
        if name: assert shapes(dump_state(create(name), 'diffusers'))==want
        again = unet_config().theirs(net)
        assert shapes(UNet2D(**again).state_dict())==want
        x, t, cond = net.demo(1)
        assert net(x, t, **cond).shape==x.shape

@pytest.mark.parametrize('name,o', [('sd15', SD), ('sd21', SD21), ('sdxl', SDXL)])
def test_published_controlnet(name, o):
    with torch.device('meta'):
        ref = Control2D(**{k: v for k,v in o.items() if k not in ('sample_size', 'up_block_types')})
        assert shapes(dump_state(create(f'{name}_controlnet').control, 'diffusers'))==shapes(ref.state_dict())
        assert shapes(dump_state(control_config().ours(dict(ref.config)), 'diffusers'))==shapes(ref.state_dict())

# --- ControlNet
@pytest.mark.parametrize('dtype,tol', [(torch.float32, 1e-5), (F64, 1e-10)], ids=['f32', 'f64'])
@pytest.mark.parametrize('i', [o for o in range(len(CONFIGS)) if isinstance(CONFIGS[o].get('layers_per_block', 2), int)])
def test_same_controlnet(i, dtype, tol):
    "What the copy gives, and what the U-Net makes of it, with a scale; also beside an inpainting network, whose copy sees the latents alone."
    o = CONFIGS[i]
    ref, net = pair(o, dtype, i)
    steps = [(16,), (8,16), (4,8,12)][i%3]
    names = set(inspect.signature(Control2D.__init__).parameters) & o.keys()
    theirs = Control2D(**{k: o[k] for k in names}|dict(in_channels=4, conditioning_embedding_out_channels=steps, conditioning_channels=1+i%3))
    theirs = randomise(nn.Module.to(theirs, dtype), i+1)
    if dtype==F64: exact(theirs)
    copy = control_config().ours(json.loads(json.dumps(dict(theirs.config)))).to(dtype).eval()
    load_state(copy, theirs.state_dict(), 'diffusers')
    assert same(dump_state(copy, 'diffusers'), theirs.state_dict())
    x, t, cond, kw = inputs(net, dtype, seed=i)
    side = 8*2**(len(steps)-1)
    picture = torch.rand(2, 1+i%3, side, side, generator=gen(i), dtype=F64).to(dtype)
    down, mid = theirs(x, t, cond['ctx'], picture, conditioning_scale=.7, return_dict=False, **kw)
    got = copy(x, t.to(dtype), **copy.prepare(picture, **cond))
    for a,b in zip([*down, mid], got, strict=True): assert diff(a, .7*b)<tol*max(1, a.abs().max())
    want = ask(ref, x, t, cond, down_block_additional_residuals=down, mid_block_additional_residual=mid, **kw)
    got = ControlNet(net, copy, .7)(x, t.to(dtype), **cond, control=picture)
    assert diff(got, want)<tol*max(1, want.abs().max()) and diff(want, ask(ref, x, t, cond, **kw))>1e-2

def test_guess_mode():
    "Their scales that grow from 0.1 to 1 are a list of ours."
    _, net = pair(TINY)
    theirs = randomise(Control2D(**{k: v for k,v in TINY.items() if k not in ('sample_size', 'up_block_types')}, conditioning_embedding_out_channels=(8,)))
    copy = control_config().ours(dict(theirs.config))
    load_state(copy, theirs.state_dict(), 'diffusers')
    x, t, cond, _ = inputs(net, torch.float32)
    down, mid = theirs(x, t, cond['ctx'], torch.ones(2, 3, 8, 8), guess_mode=True, return_dict=False)
    scale = torch.logspace(-1, 0, len(copy.zero)).tolist()
    both = ControlNet(net, copy, scale)(x, t.float(), **cond, control=torch.ones(2, 3, 8, 8))
    assert diff(both, net(x, t.float(), **cond, add=[*down, mid]))<1e-5*both.abs().max()

# --- CompVis
@pytest.mark.parametrize('i', [o for o in range(len(CONFIGS)) if isinstance(CONFIGS[o].get('layers_per_block', 2), int)
                               and CONFIGS[o].get('mid_block_type')!='UNetMidBlock2D'])
def test_ldm(i):
    "Our single file, through diffusers' own converter, is their state, tensor by tensor; and ours again, to the bit."
    ref, net = pair(CONFIGS[i], seed=i)
    ldm = {f'model.diffusion_model.{k}': v for k,v in dump_state(net, 'CompVis').items()}
    assert same(single_file.convert_ldm_unet_checkpoint(dict(ldm), dict(ref.config)), ref.state_dict())
    again = unet_config().ours(dict(ref.config))
    load_state(again, dump_state(net, 'CompVis'), 'CompVis')
    assert same(again.state_dict(), net.state_dict())

def test_ldm_names():
    "The places that the sheet names, at Stable Diffusion 1.5's sizes."
    with torch.device('meta'): names = set(dump_state(create('sd15_unet'), 'CompVis'))
    for k in ('time_embed.0', 'time_embed.2', 'input_blocks.0.0', 'input_blocks.1.0.in_layers.2', 'input_blocks.1.1.proj_in',
              'input_blocks.3.0.op', 'input_blocks.4.0.skip_connection', 'input_blocks.11.0.out_layers.3', 'middle_block.0.emb_layers.1',
              'middle_block.1.transformer_blocks.0.attn2.to_out.0', 'middle_block.2.in_layers.0', 'output_blocks.2.1.conv',
              'output_blocks.5.2.conv', 'output_blocks.11.1.transformer_blocks.0.ff.net.0.proj', 'out.0', 'out.2'):
        assert f'{k}.weight' in names
    with torch.device('meta'): xl = set(dump_state(create('sdxl_unet'), 'CompVis'))
    assert {'label_emb.0.0.weight', 'label_emb.0.2.bias', 'input_blocks.8.1.transformer_blocks.9.attn1.to_q.weight'}<=xl

def test_ldm_controlnet():
    "The authors' ControlNet file, through diffusers' converter."
    o = {k: v for k,v in TINY.items() if k not in ('sample_size', 'up_block_types')}
    theirs = randomise(Control2D(**o, conditioning_embedding_out_channels=(16,32,96,256))) # the converter knows this stack alone
    copy = control_config().ours(dict(theirs.config))
    load_state(copy, theirs.state_dict(), 'diffusers')
    ldm = dump_state(copy, 'CompVis')
    for prefix in ('control_model.', ''):
        got = single_file.convert_controlnet_checkpoint({prefix+k: v for k,v in ldm.items()}, dict(theirs.config))
        assert same(got, theirs.state_dict())
    again = control_config().ours(dict(theirs.config))
    load_state(again, ldm, 'CompVis')
    assert same(again.state_dict(), copy.state_dict())

# --- folders and files
@pytest.mark.parametrize('o', [TINY, TINY_XL], ids=['sd', 'xl'])
def test_folders(o, tmp_path):
    "A folder of theirs opens here, and one of ours opens there; the outputs are the same."
    ref, net = pair(o)
    x, t, cond, kw = inputs(net, torch.float32)
    want = ask(ref, x, t, cond, **kw)
    ref.save_pretrained(tmp_path/'theirs', max_shard_size='2MB')
    assert list((tmp_path/'theirs').glob('*.index.json'))
    got = load_folder(tmp_path/'theirs')
    assert same(got.state_dict(), net.state_dict()) and diff(got(x, t.float(), **cond), want)<1e-5
    save_folder(got, tmp_path/'ours', 'diffusers')
    back, info = UNet2D.from_pretrained(tmp_path/'ours', output_loading_info=True)
    assert not any(info.values()) and torch.equal(ask(back, x, t, cond, **kw), want)

def test_controlnet_folders(tmp_path):
    copy = randomise(control(widths=(16,32), depth=(1,0), heads=2, ctx=24, groups=8, picture=1, steps=(4,8)))
    save_folder(copy, tmp_path/'ours', 'diffusers')
    theirs = Control2D.from_pretrained(tmp_path/'ours')
    assert same(theirs.state_dict(), dump_state(copy, 'diffusers'))
    theirs.save_pretrained(tmp_path/'theirs')
    assert same(load_folder(tmp_path/'theirs').state_dict(), copy.state_dict())

def test_single_file(tmp_path):
    "A file with a text encoder and an autoencoder beside the U-Net: the prefix is found, and a network without memory is filled."
    net = randomise(sd_unet_tiny())
    others = {'first_stage_model.encoder.conv_in.weight': torch.ones(3), 'cond_stage_model.transformer.text_model.x': torch.ones(2), 'alphas_cumprod': torch.ones(4)}
    save_file({**others, **{f'model.diffusion_model.{k}': v for k,v in dump_state(net, 'CompVis').items()}}, tmp_path/'sd.safetensors')
    with Hollow(): again = sd_unet_tiny()
    report = load_single(again, tmp_path/'sd.safetensors')
    assert same(again.state_dict(), net.state_dict()) and len(report.ignored)==3
    save_single(net, tmp_path/'alone.safetensors', 'CompVis', prefix='model.diffusion_model')
    other = sd_unet_tiny()
    load_single(other, tmp_path/'alone.safetensors')
    assert same(other.state_dict(), net.state_dict())

def test_faults_are_named():
    net = sd_unet_tiny()
    state = dump_state(net, 'diffusers')
    lacks = {k: v for k,v in state.items() if k!='mid_block.resnets.1.conv2.weight'}
    with pytest.raises(ValueError, match=r'mid_block\.resnets\.1\.conv2\.weight'): load_state(sd_unet_tiny(), lacks, 'diffusers')
    other = {**state, 'conv_in.weight': torch.zeros(16, 9, 3, 3)}
    with pytest.raises(ValueError, match=r'conv_in\.weight'): load_state(sd_unet_tiny(), other, 'diffusers')
    with pytest.raises(ValueError, match='none of the tensors fits'): load_state(sd_unet_tiny(), dump_state(net, 'CompVis'), 'diffusers')

# --- configurations
def test_options_are_known():
    "Every option of diffusers' classes is read, fixed or refused by name, and its default is ours."
    for cls,make in ((UNet2D, unet_config), (Control2D, control_config)):
        ps = [p for k,p in inspect.signature(cls.__init__).parameters.items() if k not in ('self', 'kwargs')]
        with torch.device('meta'):
            assert shapes(dump_state(make().ours({p.name: p.default for p in ps}), 'diffusers'))==shapes(cls().state_dict())
            assert shapes(dump_state(make().ours({}), 'diffusers'))==shapes(cls().state_dict())

@pytest.mark.parametrize('k,v', [
    ('act_fn', 'gelu'), ('attention_type', 'gated'), ('center_input_sample', True), ('class_embed_type', 'timestep'),
    ('class_embeddings_concat', True), ('conv_in_kernel', 5), ('conv_out_kernel', 5), ('cross_attention_norm', 'layer_norm'),
    ('downsample_padding', 0), ('dropout', .1), ('dual_cross_attention', True), ('encoder_hid_dim', 12),
    ('encoder_hid_dim_type', 'text_proj'), ('flip_sin_to_cos', False), ('freq_shift', 1), ('mid_block_only_cross_attention', True),
    ('mid_block_scale_factor', 2), ('num_attention_heads', 2), ('num_class_embeds', 10), ('only_cross_attention', True),
    ('only_cross_attention', [True, False]), ('resnet_out_scale_factor', 1.4), ('resnet_skip_time_act', True),
    ('resnet_time_scale_shift', 'scale_shift'), ('reverse_transformer_layers_per_block', [[1, 2], [1, 1]]), ('time_cond_proj_dim', 256),
    ('time_embedding_act_fn', 'silu'), ('time_embedding_dim', 77), ('time_embedding_type', 'fourier'), ('timestep_post_act', 'silu'),
    ('addition_embed_type', 'text'), ('mid_block_type', None), ('mid_block_type', 'UNetMidBlock2DSimpleCrossAttn'),
    ('down_block_types', ['AttnDownBlock2D', PLAIN]), ('down_block_types', [CROSS]), ('up_block_types', ['UpBlock2D', 'UpBlock2D']),
    ('transformer_layers_per_block', [[1, 2], 1]), ('cross_attention_dim', [24, 24]), ('in_channels', 3), ('clas_embed_type', None)])
def test_options_refused(k, v):
    "By name, before anything is built."
    with pytest.raises(ValueError, match=k): unet_config().ours({**TINY, k: v})

def test_controlnet_options_refused():
    for k,v in (('controlnet_conditioning_channel_order', 'bgr'), ('global_pool_conditions', True)):
        with pytest.raises(ValueError, match=k): control_config().ours({k: v})

def test_networks_that_theirs_cannot_be():
    kw = dict(widths=(16,16), heads=2, ctx=8, groups=4)
    with pytest.raises(ValueError, match='in the middle'): unet_config().theirs(unet(**kw, depth=(1,1), mid=2))
    with pytest.raises(ValueError, match='layers in each stage'): control_config().theirs(control(**kw, depth=1, layers=(1,2)))
