"Recipes for images by text and in latents, from the command line, with tiny networks and a random sentence encoder."
import json
from pathlib import Path
import numpy as np
import pytest
import torch
import transformers
from diffnb import create, save
from diffnb.cli import main, open_model, weigh
from diffnb.codec.vae import vae_tiny
from diffnb.recipes import build, check, read
from diffnb.store import load_tensors

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

def ask(words, capsys):
    capsys.readouterr()
    code = main(words if isinstance(words, list) else words.split())
    return code, *capsys.readouterr()

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
