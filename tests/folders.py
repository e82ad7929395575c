"Tiny pipelines of diffusers with random weights, written as its folders: tokenizers of letters, encoders, networks, schedulers."
import json, string
from pathlib import Path
import diffusers, torch, transformers
import diffusers.models.autoencoders.vae
from torch import nn

diffusers.utils.logging.set_verbosity_error(); diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error(); transformers.utils.logging.disable_progress_bar()
LETTERS = string.ascii_lowercase+string.digits+"'.,-"
WORDS = 'r e', 're d</w>', 'a t</w>', 'c u', 'b e</w>', 'cu be</w>' # merges, in order

def randomise(net, seed=0):
    "Weights of a size that keeps activations near 1, so that no part is lost beside another."
    g = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        n = p[0].numel() if p.ndim>1 else 1
        p.data = (n**-.5 if p.ndim>1 else .2)*torch.randn(p.shape, generator=g).to(p)+(p.ndim==1 and bool((p==1).all()))
    return net.eval()

def clip_tokens(path, n=12):
    "A CLIP tokenizer of letters and a few merges, as files; what it makes of the end."
    path.mkdir(parents=True)
    vocab = [*LETTERS, *(c+'</w>' for c in LETTERS), *(m.replace(' ', '') for m in WORDS), '<|startoftext|>', '<|endoftext|>']
    (path/'vocab.json').write_text(json.dumps({o: i for i,o in enumerate(vocab)}))
    (path/'merges.txt').write_text('\n'.join(['#version: 0.2', *WORDS])+'\n')
    special = dict(bos_token='<|startoftext|>', eos_token='<|endoftext|>', unk_token='<|endoftext|>', pad_token='<|endoftext|>')
    (path/'special_tokens_map.json').write_text(json.dumps(special))
    (path/'tokenizer_config.json').write_text(json.dumps(dict(tokenizer_class='CLIPTokenizer', model_max_length=n, **special)))
    return len(vocab)

def t5_tokens(path, n=16):
    "A T5 tokenizer of letters."
    pieces = [('<pad>', 0.), ('</s>', 0.), ('<unk>', -5.), ('▁', -2.), *(('▁'+c, -3.) for c in LETTERS), *((c, -3.5) for c in LETTERS)]
    tok = transformers.T5Tokenizer(vocab=pieces, extra_ids=0)
    tok.model_max_length = n
    tok.save_pretrained(path)
    return len(pieces)

def clip_text(path, vocab, width=24, projected=False, n=12, seed=0):
    "A CLIP text encoder of three layers."
    config = transformers.CLIPTextConfig(vocab_size=vocab, hidden_size=width, intermediate_size=2*width, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=n, projection_dim=16, bos_token_id=vocab-2, eos_token_id=vocab-1, pad_token_id=vocab-1)
    cls = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    randomise(cls(config), seed).save_pretrained(path)

def t5_text(path, vocab, width=24, seed=0):
    config = transformers.T5Config(vocab_size=vocab, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj='gated-gelu')
    randomise(transformers.T5EncoderModel(config), seed).save_pretrained(path)

def scheduler(path, cls, **kw): getattr(diffusers, cls)(**kw).save_pretrained(path/'scheduler')
def index(path, cls, parts, **more):
    (path/'model_index.json').write_text(json.dumps({'_class_name': cls, '_diffusers_version': diffusers.__version__, **parts, **more}))

BETAS = dict(beta_schedule='scaled_linear', beta_start=.00085, beta_end=.012)
STEPS = dict(steps_offset=1, timestep_spacing='leading')
def vae(path, z=4, scale=.5, seed=5, **kw):
    o = diffusers.AutoencoderKL(block_out_channels=(8,16), down_block_types=('DownEncoderBlock2D',)*2, up_block_types=('UpDecoderBlock2D',)*2, layers_per_block=1,
                                norm_num_groups=8, latent_channels=z, scaling_factor=scale, sample_size=16, **kw)
    randomise(o, seed).save_pretrained(path/'vae')

CROSS, PLAIN = 'CrossAttnDownBlock2D', 'DownBlock2D'
def unet(path, types=(CROSS, PLAIN), ctx=24, ch=4, seed=1, cls='UNet2DConditionModel', part='unet', **kw):
    up = {} if part!='unet' else dict(sample_size=8, out_channels=4, up_block_types=tuple(t.replace('Down', 'Up') for t in reversed(types)))
    o = getattr(diffusers, cls)(in_channels=ch, block_out_channels=(16,24), layers_per_block=1, down_block_types=types,
                                cross_attention_dim=ctx, attention_head_dim=2, norm_num_groups=8, **up, **kw)
    randomise(o, seed).save_pretrained(path/part)

def sd(path, cls='StableDiffusionPipeline', sched=('PNDMScheduler', dict(skip_prk_steps=True, set_alpha_to_one=False, **STEPS)), ch=4, control=False):
    "Stable Diffusion 1.5's kind."
    vocab = clip_tokens(path/'tokenizer')
    clip_text(path/'text_encoder', vocab)
    unet(path, ch=ch); vae(path)
    scheduler(path, sched[0], **BETAS, **sched[1])
    parts = dict(unet=['diffusers', 'UNet2DConditionModel'], vae=['diffusers', 'AutoencoderKL'], scheduler=['diffusers', sched[0]],
                 text_encoder=['transformers', 'CLIPTextModel'], tokenizer=['transformers', 'CLIPTokenizer'], safety_checker=[None, None], feature_extractor=[None, None])
    if control:
        unet(path, ch=4, seed=2, cls='ControlNetModel', part='controlnet', conditioning_embedding_out_channels=(4,8))
        parts['controlnet'] = ['diffusers', 'ControlNetModel']
    index(path, cls, parts, requires_safety_checker=False)
    return path

def xl(path, cls='StableDiffusionXLPipeline', sched=('EulerDiscreteScheduler', STEPS), zeros=True, ch=4, control=False):
    "XL's kind: two encoders, the sizes."
    for two,width,seed in (('', 24, 0), ('_2', 20, 7)):
        vocab = clip_tokens(path/f'tokenizer{two}')
        clip_text(path/f'text_encoder{two}', vocab, width, projected=bool(two), seed=seed)
    more = dict(addition_embed_type='text_time', addition_time_embed_dim=8, projection_class_embeddings_input_dim=16+6*8, use_linear_projection=True)
    unet(path, (PLAIN, CROSS), ctx=44, ch=ch, transformer_layers_per_block=[1,2], **more)
    vae(path, scale=.4)
    scheduler(path, sched[0], **BETAS, **sched[1])
    parts = dict(unet=['diffusers', 'UNet2DConditionModel'], vae=['diffusers', 'AutoencoderKL'], scheduler=['diffusers', sched[0]],
                 text_encoder=['transformers', 'CLIPTextModel'], text_encoder_2=['transformers', 'CLIPTextModelWithProjection'],
                 tokenizer=['transformers', 'CLIPTokenizer'], tokenizer_2=['transformers', 'CLIPTokenizer'])
    if control:
        unet(path, (PLAIN, CROSS), ctx=44, seed=2, cls='ControlNetModel', part='controlnet', transformer_layers_per_block=[1,2], conditioning_embedding_out_channels=(4,8), **more)
        parts['controlnet'] = ['diffusers', 'ControlNetModel']
    index(path, cls, parts, force_zeros_for_empty_prompt=zeros)
    return path

def flux(path, cls='FluxPipeline', dev=True, extra=0):
    "FLUX.1's kind: CLIP's vector, T5's tokens."
    clip_text(path/'text_encoder', clip_tokens(path/'tokenizer'))
    t5_text(path/'text_encoder_2', t5_tokens(path/'tokenizer_2'))
    o = diffusers.FluxTransformer2DModel(in_channels=16+4*extra, out_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
                                         joint_attention_dim=24, pooled_projection_dim=24, guidance_embeds=dev, axes_dims_rope=(4,6,6))
    randomise(o, 3).save_pretrained(path/'transformer')
    vae(path, scale=.4, shift_factor=.1, use_quant_conv=False, use_post_quant_conv=False)
    moving = dict(shift=3., use_dynamic_shifting=True, base_shift=.5, max_shift=1.15, base_image_seq_len=4, max_image_seq_len=64) if dev else dict(shift=1.)
    scheduler(path, 'FlowMatchEulerDiscreteScheduler', **moving)
    parts = dict(transformer=['diffusers', 'FluxTransformer2DModel'], vae=['diffusers', 'AutoencoderKL'], scheduler=['diffusers', 'FlowMatchEulerDiscreteScheduler'],
                 text_encoder=['transformers', 'CLIPTextModel'], text_encoder_2=['transformers', 'T5EncoderModel'], tokenizer=['transformers', 'CLIPTokenizer'],
                 tokenizer_2=['transformers', 'T5Tokenizer'], image_encoder=[None, None], feature_extractor=[None, None])
    index(path, cls, parts)
    return path
