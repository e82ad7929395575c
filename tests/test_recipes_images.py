"Recipes for images by text and in latents, from the command line, with tiny networks and a random sentence encoder."
import json, shutil
from pathlib import Path
import numpy as np
import pytest
import torch
import transformers
from diffnb import create, save
from diffnb.cli import main
from diffnb.codec.vae import vae_tiny
from diffnb.data.images import emoji
from diffnb.hub import load_folder
from diffnb.recipes import build, check, consistent, read, shipped
from diffnb.store import load_tensors, save_tensors
from diffnb.viz import save_png
from shell import ask

TEXT = '''
about: emoji by their names
model: {name: sd_unet_tiny, size: 32, ch: 3, ctx: 16}
data: {set: emoji, transforms: [floats, hflip]}
conditioner: {name: sentence, path: encoder, length: 16, give: [ctx], cache: encodings}
train: {steps: 2, batch: 4, drop: 0.5, log_every: 1, lr: {name: constant, lr: 1.0e-3}}
sample: {n: 3, steps: 2, sampler: euler, w: 2.0}
'''
LATENT = '''
about: latents of emoji by class
model: {name: dit_tiny, size: 8, ch: 4, classes: 9}
data: {set: emoji, transforms: [hflip]}
codec: {name: stored_codec, path: vae}
train: {steps: 3, batch: 4, drop: 0.1, log_every: 1, lr: {name: constant, lr: 1.0e-3}}
sample: {n: 9, steps: 2, sampler: euler}
'''

@pytest.fixture(scope='module')
def parts(tmp_path_factory):
    "A folder with a random sentence encoder and a random codec."
    root = tmp_path_factory.mktemp('parts')
    words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', 'red', 'heart', 'flag', 'face', 'cat', *'abcdefghijklmnopqrstuvwxyz', *('##'+c for c in 'abcdefghijklmnopqrstuvwxyz')]
    (root/'vocab.txt').write_text('\n'.join(words))
    transformers.BertTokenizerFast(vocab=str(root/'vocab.txt')).save_pretrained(root/'encoder')
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                                                   max_position_embeddings=16)).save_pretrained(root/'encoder')
    save(vae_tiny(), root/'vae')
    return root

@pytest.fixture
def here(parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for o in ('encoder', 'vae'): Path(o).symlink_to(parts/o)
    Path('text.yaml').write_text(TEXT); Path('latent.yaml').write_text(LATENT)
    Path('blind.yaml').write_text(TEXT.replace('sd_unet_tiny, size: 32, ch: 3, ctx: 16', 'diffit_tiny, size: 32, classes: 0'))
    return tmp_path

def test_by_text(here, capsys):
    "Train, sample a prompt, sample captions in turn; a prompt changes the picture, and so does a negative one."
    code, out, err = ask('train text.yaml --out run', capsys)
    assert code==0 and 'run has 2 steps, 8 samples' in out, err
    assert len(list(Path('encodings').rglob('*.safetensors')))>4
    def x(*words):
        code, _, err = ask(['sample', 'run', '--out', 'x.npz', *words], capsys)
        assert code==0, err
        with np.load('x.npz') as z: return z['x'], z['text'].tolist()
    a, said = x('--prompt', 'red heart')
    assert a.shape==(3, 32, 32, 3) and said==['red heart']*3 and (a==x('--prompt', 'red heart')[0]).all()
    assert (a!=x('--prompt', 'cat face')[0]).any() and (a!=x('--prompt', 'red heart', '--negative', 'flag')[0]).any()
    Path('wanted.txt').write_text('red heart\n\ncat face\n')
    b, said = x('--prompts', 'wanted.txt')
    assert said==['red heart', 'cat face', 'red heart'] and (b[0]==a[0]).all()
    assert len(set(x('--n', '5')[1]))==5 # captions of the data set
    assert ask('sample run --prompt cat', capsys)[0]==0 and Path('samples.png').exists()
    assert 'samples.png exists' in ask('sample run --prompt cat', capsys)[2]
    for words,why in {'sample run --y 3 --out y.png': 'reads texts', 'sample run --prompt a --prompts wanted.txt --out y.png': 'not both'}.items():
        assert why in ask(words, capsys)[2] and not Path('y.png').exists()

def test_weights_alone_depend_on_the_text(here):
    "The encoder is frozen: the run holds the denoiser's tensors, and goes on bit for bit."
    r = check(read('text.yaml'))
    b = build(r)
    assert b.task.net is b.task.denoiser
    assert main('train text.yaml --out whole'.split())==0
    assert main('train text.yaml --out two --train.steps=1'.split())==0 and main('train text.yaml --out two'.split())==0
    a, b = (load_tensors(next(Path(o).glob('step-00000002'))/'model.safetensors')[0] for o in ('whole', 'two'))
    assert a.keys()==b.keys() and all((a[k]==b[k]).all() for k in a)

def test_latents(here, capsys):
    "With a cache and without: the same losses; another codec's cache is refused."
    assert ask('train latent.yaml --out plain', capsys)[0]==0
    assert ask('train latent.yaml --out cached --data.latents=kept', capsys)[0]==0
    a, b = ([json.loads(o)['loss'] for o in Path(k, 'log.jsonl').read_text().splitlines()] for k in ('plain', 'cached'))
    np.testing.assert_allclose(a, b, rtol=1e-6)
    assert ask('sample cached --out x.npz', capsys)[0]==0
    with np.load('x.npz') as z: assert z['x'].shape==(9, 32, 32, 3) and z['x'].dtype==np.uint8
    torch.manual_seed(1)
    save(vae_tiny(), 'other')
    assert 'was made by another codec' in ask('train latent.yaml --out more --data.latents=kept --codec.path=other', capsys)[2]
    assert not Path('more').exists()

WRONG = {
    'train text.yaml --data.set=fashion_mnist --model.ch=1 --model.size=28': 'has no captions',
    'train text.yaml --conditioner.path=nowhere': 'conditioner.path: nowhere is not there',
    'train text.yaml --conditioner.path=vae': 'vae has no tokenizer.json',
    'train blind.yaml': 'reads no text',
    'train latent.yaml --model.size=16': 'the codec makes (4, 8, 8)',
    'train latent.yaml --codec.path=gone': 'codec.path: gone is not there',
    'train latent.yaml --data.latents=kept --data.transforms=[{name: random_crop, size: 32}]': 'cannot have random_crop',
    'train text.yaml --system=pictures': "there is no 'pictures'",
}
@pytest.mark.parametrize('words', WRONG)
def test_mistakes(words, here, capsys):
    *words, last = words.split(' --data.transforms=') if '--data.transforms' in words else [words]
    argv = (words[0].split()+[f'--data.transforms={last}']) if words else last.split()
    code, out, err = ask(argv, capsys)
    assert code==2 and WRONG[' --data.transforms='.join([*words, last])] in err, err
    assert not Path('runs').exists() and not Path('kept').exists()

def test_a_run_of_a_codec_means_its_finished_one(tmp_path):
    "Beside the raw weights a run keeps a codec whose latents have spread 1: that one is opened."
    for k,z in (('.', 4), ('codec', 3)): save(create('vae_tiny', 'codec', z=z), (tmp_path/'run'/k).resolve())
    assert [create('stored_codec', 'codec', path=str(tmp_path/k)).z for k in ('run', 'run/codec')]==[3, 3]

def test_a_prompt_for_a_model_that_reads_none(here, capsys):
    assert 'reads no text' in ask('sample fashion --prompt shoe --out x.png', capsys)[2]

# --- what ships: fits together, and its twin of a few steps runs ---
def test_shipped_recipes_fit_together():
    "Every one, without a file of it; and what each is there for."
    r = {n: consistent(read(n)) for n in shipped() if read(n).get('system', 'images')=='images'}
    assert {'dit_xl_2', 'sit_xl_2', 'diffit_xl_2', 'sd15', 'sd21_v', 'sdxl', 'flux_dev', 'sd15_controlnet', 'emoji_latent', 'emoji_text'}<=r.keys()
    assert all(r[k].data.latents and r[k].train.drop==.1 for k in ('dit_xl_2', 'sit_xl_2', 'diffit_xl_2'))
    assert r['sd15'].process.pred=='eps' and r['sd15'].process.weight['name']=='min_snr' and r['sd15'].train.times['name']=='later'
    assert r['sd21_v'].process.pred=='v' and r['sd21_v'].process.schedule['name']=='zero_snr' and r['sd21_v'].conditioner['learn']
    assert r['sdxl'].data.set['name']=='buckets' and (r['flux_dev'].process.schedule['name'], r['flux_dev'].process.pred)==('straight', 'flow')
    assert 'edges' in [t['name'] for t in r['sd15_controlnet'].data.transforms]

@pytest.fixture(scope='module')
def foreign(tmp_path_factory):
    "Folders of diffusers, each made once; pictures of several shapes with captions; and pictures to follow."
    folders = pytest.importorskip('folders')
    at = tmp_path_factory.mktemp('foreign')
    folders.sd(at/'sd'); folders.xl(at/'xl'); folders.flux(at/'flux')
    folders.sd(at/'control', control=True, cls='StableDiffusionControlNetPipeline')
    (at/'pictures').mkdir(); (at/'sketches').mkdir(); (at/'shapes').mkdir()
    said, x = [], emoji('test').pixels
    for i in range(12):
        for k,o in (('pictures', x[i]), ('sketches', 255-x[i]), ('shapes', x[i,:,:,:16] if i%2 else x[i,:,:16])): save_png(at/k/f'{i}.png', o[None], ncol=1, pad=0)
        said.append(json.dumps(dict(file_name=f'{i}.png', text=['a red cube', 'a cat', 'be'][i%3])))
    for k in ('pictures', 'shapes'): (at/k/'metadata.jsonl').write_text('\n'.join(said))
    return at

def model_of(path, part):
    "The recipe's `model` for a folder's network."
    net = load_folder(path, part)
    side = dict(demo=[16, 16, 5]) if part=='transformer' else dict(size=16)
    return '--model='+json.dumps({'name': net.preset['name'], **net.preset['kw'], **side})

def few(at, kind, data='pictures', part='unet', **more):
    "Overrides that make a shipped recipe a run of two steps with a tiny folder."
    keys = {'weights': at/kind, 'codec.path': at/kind, 'conditioner.path': at/kind, 'data.set.path': at/data, 'data.workers': 0, 'train.steps': 2, 'train.batch': 4, 'train.accumulate': 1,
            'train.drop': .5, 'train.amp': 'null', 'train.log_every': 1, 'train.lr': '{name: constant, lr: 1.0e-3}', 'sample.n': 3, 'sample.steps': 2, 'sample.w': 2., 'sample.batch': 64}
    return [model_of(at/kind, part), *(f'--{k}={v}' for k,v in {**keys, **more}.items())]

def trained(name, words, capsys, out='run'):
    "Train; the last step's loss, and the tensors."
    code, _, err = ask(['train', name, '--out', out, *words], capsys)
    assert code==0, err
    return json.loads(Path(out, 'log.jsonl').read_text().splitlines()[-1])['loss'], load_tensors(next(Path(out).glob('step-*2'))/'model.safetensors')[0]

TWINS = {'sd15': dict(kind='sd', **{'data.set.size': 32, 'conditioner.cache': 'texts'}), 'sd21_v': dict(kind='sd', **{'data.set.size': 32}),
         'sdxl': dict(kind='xl', data='shapes', **{'data.set.area': 512, 'data.set.unit': 16, 'data.set.least': 1, 'conditioner.cache': 'texts'}),
         'flux_dev': dict(kind='flux', part='transformer', **{'data.set.size': 32, 'data.latents': 'kept', 'conditioner.cache': 'texts', 'train.drop': 0., 'sample.w': 1.})}
@pytest.mark.parametrize('name', TWINS)
def test_twins(name, foreign, tmp_path, monkeypatch, capsys):
    "Two steps from a folder's weights, then pictures of a prompt; the folder is not asked for its network again."
    monkeypatch.chdir(tmp_path)
    words = few(foreign, **TWINS[name])
    r = check(read(name), words)
    part = TWINS[name].get('part', 'unet')
    theirs, b = load_folder(foreign/TWINS[name]['kind'], part).state_dict(), build(r)
    assert all((v==theirs[k]).all() for k,v in b.task.denoiser.state_dict().items()) # it starts there
    batch = next(b.batches())
    assert set(batch['cond'])=={'sd15': {'text'}, 'sd21_v': {'text'}, 'sdxl': {'text', 'ids'}, 'flux_dev': {'text', 'guidance'}}[name]
    loss, t = trained(name, words, capsys)
    assert np.isfinite(loss)
    own = {k.removeprefix('denoiser.'): v for k,v in t.items()}
    assert any((own[k]!=v).any() for k,v in theirs.items())
    if name=='sd21_v': assert any(k.startswith('conditioner.') for k in t)
    code, _, err = ask('sample run --out x.npz --prompt cat', capsys)
    assert code==0, err
    with np.load('x.npz') as z: assert z['x'].dtype==np.uint8 and len(z['x'])==3

@pytest.mark.parametrize('name', ['sd15', 'flux_dev'])
def test_finetune_on_their_folder(name, foreign, tmp_path, monkeypatch, capsys):
    "An adapter on a folder of diffusers: the folder stays as it is, the run goes on, both sides draw the same, and scale 0 is the base."
    monkeypatch.chdir(tmp_path)
    o = TWINS[name]
    base, words = foreign/o['kind'], [w for w in few(foreign, **{**o, 'train.averages': '{}', 'sample.average': 'null'}) if not w.startswith('--weights')]
    before = {f: f.read_bytes() for f in base.rglob('*') if f.is_file()}
    def good(*argv):
        code, out, err = ask(list(map(str, argv)), capsys)
        assert code==0, err
        return out
    def tune(out, *more): good('finetune', name, '--base', base, '--adapter', '{name: lora, rank: 2}', '--out', out, *words, '--train.lr={name: constant, lr: 3.0e-2}', *more)
    def x(*argv):
        good('sample', *argv, '--prompt', 'cat', '--out', 'x.npz')
        with np.load('x.npz') as z: return z['x']
    tune('run'); tune('parts', '--train.steps=1'); tune('parts')
    a, b = (load_tensors(f'{k}/adapter/adapter.safetensors')[0] for k in ('run', 'parts'))
    assert a.keys()==b.keys() and all((v==b[k]).all() for k,v in a.items()) and any(v.any() for k,v in a.items() if k.endswith('B'))
    assert all('adapters' in k.split('.') for k in load_tensors(next(Path('run').glob('step-*2'))/'model.safetensors')[0])
    on, off, own = x(base, '--adapter', 'run'), x(base, '--adapter', 'run', '--adapter-scale', 0), x('run')
    assert on.shape==(3, 32, 32, 3) and (on==own).all() and (on!=off).any()
    good('train', name, '--out', 'none', *words, f'--weights={base}', '--train.steps=1', '--train.lr={name: constant, lr: 0.0}')
    assert (off==x('none')).all() # a step of rate 0 leaves the folder's weights
    assert before=={f: f.read_bytes() for f in base.rglob('*') if f.is_file()}
    shutil.copytree(base, 'other')
    f = next(Path('other', o.get('part', 'unet')).glob('*.safetensors'))
    save_tensors(f, {k: v+.01 for k,v in load_tensors(f)[0].items()})
    code, _, err = ask('sample other --adapter run --prompt cat --out y.npz', capsys)
    assert code==2 and 'another base' in err and len(err.strip().splitlines())==1 and not Path('y.npz').exists(), err

def test_text_encoder_learns_slowly(foreign, tmp_path, monkeypatch):
    "At a tenth of the rate, and all of it."
    monkeypatch.chdir(tmp_path)
    b = build(check(read('sd21_v'), few(foreign, **TWINS['sd21_v'])))
    opt = b.task.optimiser(b.task.net)
    assert {g['lr_share'] for g in opt.param_groups}=={1., .1}
    assert sum(len(g['params']) for g in opt.param_groups)==len(list(b.task.net.parameters()))

CONTROL = {'data.set.size': 32, 'conditioner.cache': 'texts'}
def controlnet(at, kind='sd'):
    "A model like the folder's, with a ControlNet."
    kw = load_folder(at/kind, 'unet').preset['kw']
    return ['--model='+json.dumps({'name': 'unet_controlnet', 'steps': [4, 8], **kw, 'size': 16})]

def test_controlnet(foreign, tmp_path, monkeypatch, capsys):
    "The copy starts as the base, learns alone, and follows: other pictures to follow, other pictures."
    monkeypatch.chdir(tmp_path)
    words = few(foreign, 'sd', **CONTROL)[1:]+controlnet(foreign)
    theirs = load_folder(foreign/'sd', 'unet').state_dict()
    net = build(check(read('sd15_controlnet'), words)).task.denoiser
    assert all((v==theirs[f'enc.{k}']).all() for k,v in net.control.enc.state_dict().items()) and not any(p.requires_grad for p in net.net.parameters())
    loss, t = trained('sd15_controlnet', words, capsys)
    assert np.isfinite(loss) and all((t[f'net.{k}']==v).all() for k,v in theirs.items()) and any(v.any() for k,v in t.items() if k.startswith('control.zero'))
    assert ask('sample run --out x.npz --prompt cat', capsys)[0]==0
    with np.load('x.npz') as z: assert z['control'].shape==(3, 3, 32, 32) and (z['control'][0]!=z['control'][1]).any()
    # a second folder to follow, and a ControlNet that the folder has
    pairs = [o for o in words if not o.startswith('--data.set')]+[f'--data.set={{name: pairs, path: {foreign/"pictures"}, control: {foreign/"sketches"}, captions: metadata.jsonl, size: 32}}', '--data.transforms=[hflip]']
    b = build(check(read('sd15_controlnet'), [*pairs, f'--weights={foreign/"control"}']))
    batch = next(b.batches())
    own = load_folder(foreign/'control', 'controlnet').state_dict()
    assert all((v==own[k]).all() for k,v in b.task.denoiser.control.state_dict().items()) and batch['cond']['control'].shape==(4, 3, 32, 32)
    plain = [o for o in words if not o.startswith('--data.transforms')]+['--data.transforms=[hflip]']
    assert 'nothing to follow' in ask(['train', 'sd15_controlnet', '--out', 'none', *plain], capsys)[2]

LATENTS = {'dit_xl_2': 'name: dit_tiny, size: 8, classes: 9, sigma: true', 'sit_xl_2': 'name: dit_tiny, size: 8, classes: 9, sit: true',
           'diffit_xl_2': 'name: diffit_latent_tiny, size: 8, classes: 9, sigma: true'}
@pytest.mark.parametrize('name', LATENTS)
def test_latent_twins(name, here, capsys):
    "By class in cached latents: two steps, pictures of all classes."
    words = [f'--model={{{LATENTS[name]}}}', '--data.set=emoji', '--data.latents=kept', '--data.workers=0', '--codec.path=vae', '--train.steps=2', '--train.batch=4', '--sample.n=9', '--sample.steps=3']
    loss, _ = trained(name, words, capsys)
    assert np.isfinite(loss) and Path('kept/latents.json').exists()
    assert ask('sample run --out x.npz', capsys)[0]==0
    with np.load('x.npz') as z: assert z['x'].shape==(9, 32, 32, 3) and z['y'].tolist()==list(range(9))

def test_buckets(foreign, tmp_path, monkeypatch, capsys):
    "Batches of one shape each, XL's numbers of each picture; and what they cannot have."
    monkeypatch.chdir(tmp_path)
    words = few(foreign, **TWINS['sdxl'])
    b = build(check(read('sdxl'), words))
    seen = {tuple(o['z'].shape[2:]): o['cond']['ids'] for o,_ in zip(b.batches(), range(8))}
    assert seen.keys()=={(8, 16), (16, 8)}
    for (h, w),ids in seen.items(): assert (ids[:,4:]==torch.tensor([2*h, 2*w])).all()
    for more,why in {'--data.latents=kept': 'many shapes', f'--data.set.captions=none.jsonl': 'holds no none.jsonl', '--data.set.least=99': 'no bucket has 99'}.items():
        assert why in ask(['train', 'sdxl', '--out', 'none', *words, more], capsys)[2]
    assert not Path('none').exists() and not Path('kept').exists()

NOT = {'--terms.beta=1': 'terms are for system: codec', '--train.optimiser=shared': 'the denoiser alone is trained',
       '--weights=vae': 'does not fit', '--weights=gone': 'there is no folder gone'}
@pytest.mark.parametrize('more', NOT)
def test_more_mistakes(more, here, capsys):
    code, _, err = ask(['train', 'text.yaml', more], capsys)
    assert code==2 and NOT[more] in err, err

def test_guidance_must_be_told():
    with pytest.raises(ValueError, match='flux_dev reads guidance: data.transforms must have guided'): consistent(read('flux_dev'), ['--data.transforms=[hflip]'])
