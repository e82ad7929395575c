"Recipes for text, from the command line: tiny networks train, go on, answer prompts, are measured and given away."
import json
from pathlib import Path
import numpy as np, pytest, torch, transformers
from diffnb.cli import open_model, weigh
from diffnb.data.text import movie_snippets, tokenizer, train_tokenizer
from diffnb.metrics.text import load_predictions
from diffnb.recipes import build, check, consistent, read, shipped
from diffnb.store import load_tensors
from shell import among, ask

REVIEWS = '''
about: sentiment
system: masked_text
model: {name: mlm, dim: 16, depth: 1, heads: 2, hidden: 32}
data: {set: reviews.jsonl.set, length: 64, room: 1, transforms: [{name: forget, p: 0.2}]}
process: {schedule: {name: poly, n: 1.0}}
train: {steps: 4, batch: 4, times: at_the_end, log_every: 1, lr: {name: constant, lr: 1.0e-3}}
sample: {n: 3, steps: 1, sampler: confident, narrow: {name: narrow, temperature: 0.0}}
eval: {n: 20, metrics: [label_accuracy, majority, unparsed, perplexity_bound, unigram_perplexity]}
'''.replace('reviews.jsonl.set', '{name: sst2, path: data}').replace('length: 64', 'tokenizer: {name: wordpieces, vocab: 300}, length: 64')
PAGES = '''
about: plain text by hidden tokens
system: masked_text
model: {name: mlm, dim: 16, depth: 1, heads: 2, hidden: 32}
data: {set: {name: plain, path: pages}, tokenizer: {name: byte_level, vocab: 300}, length: 24}
train: {steps: 2, batch: 4, times: stratified, log_every: 1}
sample: {n: 2, steps: 4}
eval: {n: 4, metrics: [perplexity_bound, distinct_2], split: test}
'''
DIMBA = '''
about: pages gone on with, as vectors
system: vector_text
model: {name: dimba, vec: 8, dim: 16, depth: 1, head: 8, state: 4, cond: 16, prompt_depth: 1}
data: {set: {name: plain, path: pages}, tokenizer: {name: wordpieces, vocab: 300}, length: 16, given: 8}
process: {pred: x0, self_cond: 0.5, anchor: 0.1}
train: {steps: 4, batch: 4, drop: 0.1, times: shifted_times, log_every: 1, lr: {name: constant, lr: 1.0e-3}}
sample: {n: 3, steps: 3, w: 1.5}
eval: {n: 16, split: test, metrics: [right_tokens, shuffled_tokens, unigram_tokens, rouge_l]}
'''

@pytest.fixture(scope='module')
def files(tmp_path_factory):
    "Reviews and pages in files."
    root = tmp_path_factory.mktemp('files')
    texts = movie_snippets('test')
    short = [i for i in range(len(texts)) if len(texts.prompts[i])<90][:60]
    rows = [dict(sentence=texts.prompts[i][8:-11], label=int(texts.labels[i])) for i in short]
    (root/'data').mkdir(); (root/'pages').mkdir()
    for split,o in (('train', rows[:40]), ('validation', rows[40:])):
        (root/'data'/f'{split}.jsonl').write_text(''.join(json.dumps(r)+'\n' for r in o))
    for split,o in (('train', rows[:40]), ('test', rows[40:])):
        (root/'pages'/f'{split}.txt').write_text('\n\n'.join(r['sentence'] for r in o))
    for k,v in dict(reviews=REVIEWS, pages=PAGES, dimba=DIMBA).items(): (root/f'{k}.yaml').write_text(v)
    return root

@pytest.fixture
def here(files, tmp_path, monkeypatch):
    return among(files, tmp_path, monkeypatch)

def good(words, capsys):
    code, out, err = ask(words, capsys)
    assert code==0, err
    return out

MINE = [k for k in shipped() if read(k).get('system', '').endswith('_text')]
def test_what_ships():
    assert {'docs_masked', 'docs_dimba', 'reviews', 'reviews_minilm', 'squad_minilm', 'xsum_minilm'}<={*MINE}

@pytest.mark.parametrize('name', MINE)
def test_shipped_recipes_are_consistent(name):
    "Keys, names, lengths and shapes; and a metric that needs another sort of text is found."
    r = consistent(read(name))
    assert r.about and r.eval.metrics and r.eval.split in ('test', 'validation')
    wrong = 'right_tokens' if name!='docs_dimba' else 'perplexity_bound'
    with pytest.raises(ValueError, match='eval.metrics'): consistent(read(name), [f'--eval.metrics=[{wrong}]'])

@pytest.mark.parametrize('name', ['squad_minilm', 'xsum_minilm'])
def test_missing_data_is_said(name, here, capsys):
    code, _, err = ask(f'train {name}', capsys)
    assert code==2 and f'data.set.path: data/{name.split("_")[0]} is not there' in err and len(err.strip().splitlines())==1
    assert 'no package' in ask(f'train reviews_minilm --weights=package:nobody_has_this/model', capsys)[2]
    assert not Path('runs').exists()

@pytest.mark.parametrize('name', ['reviews', 'dimba'])
def test_a_run_goes_on_bit_for_bit(name, here, capsys):
    good(f'train {name}.yaml --out whole', capsys)
    good(f'train {name}.yaml --out two --train.steps=2', capsys); good(f'train {name}.yaml --out two', capsys)
    a, b = (load_tensors(Path(o, 'step-00000004', 'model.safetensors'))[0] for o in ('whole', 'two'))
    assert a.keys()==b.keys() and all((a[k]==b[k]).all() for k in a)
    assert tokenizer('whole').id==tokenizer('two').id

def test_answers(here, capsys):
    "Train, ask, measure, give away; what was written is kept, and the folder given away answers alike."
    good('train reviews.yaml --out run', capsys)
    out = good(['sample', 'run', '--prompt', 'review: a delight sentiment:'], capsys).splitlines()
    assert len(out)==3 and len(set(out))==1 and out[0].startswith('review: a delight sentiment: | ')
    Path('ask.txt').write_text('review: dull sentiment:\n\nreview: a very long and winding delight sentiment:\n')
    good('sample run --prompts ask.txt --n 5 --out a.jsonl', capsys); good('sample run --prompts ask.txt --n 5 --out a.txt', capsys)
    rows = [json.loads(o) for o in Path('a.jsonl').read_text().splitlines()]
    assert [o['prompt'][8:12] for o in rows]==['dull', 'a ve']*2+['dull'] and [o['text'] for o in rows]==Path('a.txt').read_text().splitlines()
    held = good('sample run', capsys) # held-out prompts in turn
    assert held.count('sentiment: | ')==3 and len(set(held.splitlines()))==3
    good('eval run', capsys)
    numbers = {(o := json.loads(k))['metric']: o['value'] for k in Path('run/eval.jsonl').read_text().splitlines()}
    p = load_predictions('run/predictions.jsonl')
    right = [int(json.loads(o)['label']) for o in Path('data/validation.jsonl').read_text().splitlines()]
    assert len(p)==20 and [o[0] for o in p.right]==[('negative', 'positive')[k] for k in right]
    assert numbers['label_accuracy']==100*np.mean([t==r[0] for t,r in zip(p.texts, p.right)])
    assert numbers['majority']==100*max(np.mean(right), 1-np.mean(right)) and 1<numbers['perplexity_bound']<1000
    good('export run --out given', capsys)
    assert good(['sample', 'given', '--prompts', 'ask.txt'], capsys)==good(['sample', 'run', '--prompts', 'ask.txt'], capsys)
    Path('data').unlink() # the tokenizer was kept: no data is needed
    assert good(['sample', 'given', '--prompt', 'fine'], capsys)

def test_an_untrained_tokenizer_is_not_made_again(here, capsys):
    "The run's own is taken, whatever the texts are by now."
    good('train reviews.yaml --out run --train.steps=1', capsys)
    tok = train_tokenizer(['other words altogether'], 300)
    for k,v in tok.as_files().items(): Path('run', k).write_text(v)
    m = open_model('run')
    with pytest.raises(ValueError): weigh(m) # another number of tokens: the weights do not fit

def test_plain_text(here, capsys):
    good('train pages.yaml --out run', capsys)
    out = good('sample run', capsys)
    a = good(['sample', 'run', '--prompt', 'A film', '--out', 'a.jsonl'], capsys)
    assert [json.loads(o)['prompt'] for o in Path('a.jsonl').read_text().splitlines()]==['A film']*2
    assert 'perplexity_bound' in good('eval run', capsys) and len(load_predictions('run/predictions.jsonl'))==4
    assert 'at most 23 fit: shorten it' in ask(['sample', 'run', '--prompt', 'a long one '*9], capsys)[2]

def test_dimba(here, capsys):
    good('train dimba.yaml --out run', capsys)
    out = good(['sample', 'run', '--prompt', 'the film'], capsys).splitlines()
    assert len(out)==3 and all(o.startswith('the film | ') for o in out)
    good('sample run --n 2 --out a.txt', capsys); good('sample run --n 4 --out b.txt', capsys)
    assert Path('b.txt').read_text().splitlines()[:2]==Path('a.txt').read_text().splitlines()
    good('eval run', capsys)
    numbers = {(o := json.loads(k))['metric']: o for k in Path('run/eval.jsonl').read_text().splitlines()}
    assert {'right_tokens', 'shuffled_tokens', 'unigram_tokens', 'rougel'}=={*numbers} and numbers['right_tokens']['n']==16
    p = load_predictions('run/predictions.jsonl')
    assert len(p)==16 and all(p.prompts)
    good('export run --out given', capsys)
    assert good(['sample', 'given', '--prompt', 'the film'], capsys).splitlines()==out

def test_weights_to_start_from(here, capsys):
    "A run's export, or a network of transformers; only what is loaded differs from a fresh start; shapes that do not fit are said."
    good('train reviews.yaml --out run --train.steps=1', capsys); good('export run --out given', capsys)
    good('train dimba.yaml --out vec --train.steps=1', capsys); good('export vec --out vectors', capsys)
    for o,k in (('vectors', None), ('vec', 'ema')): # a folder with more than a network, and a run
        net = build(check(read('dimba.yaml'), [f'--weights={o}'])).task.net.state_dict()
        assert all((net[k]==v).all() for k,v in load_tensors('vectors/model.safetensors')[0].items())
    r = check(read('reviews.yaml'), ['--weights=given'])
    a, b = build(r).task.net.state_dict(), load_tensors('given/model.safetensors')[0]
    assert all((a[k]==v).all() for k,v in b.items())
    assert 'given' in ask('train reviews.yaml --weights=given --model.dim=32 --out no', capsys)[2]
    tok = tokenizer('given')
    torch.manual_seed(0)
    bert = transformers.BertModel(transformers.BertConfig(vocab_size=len(tok), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                                          intermediate_size=32, max_position_embeddings=64)).eval()
    bert.save_pretrained('theirs'); tok.save('theirs')
    own = ['--model={name: bert, dim: 16, depth: 1, heads: 2, hidden: 32, positions: 64, transform: false}', '--weights=theirs',
           '--data.tokenizer={name: tokenizer, path: theirs}']
    task = build(check(read('reviews.yaml'), own)).task
    x = torch.randint(5, len(tok), (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(task.net.eval().features(x, torch.ones(1)).h, bert(x).last_hidden_state, atol=1e-5, rtol=1e-5)
    good(['train', 'reviews.yaml', '--out', 'r', *own, '--train.steps=1'], capsys)
    good(['sample', 'r', '--prompt', 'fine'], capsys)
    assert Path('r/tokenizer.json').is_file()

THEIRS = dict(bert='{name: bert, dim: 16, depth: 1, heads: 2, hidden: 32, positions: 64, transform: true}',
              mamba2='{name: mamba2, dim: 16, depth: 2, mixer: causal, head: 8, state: 4}')
def of_transformers(kind, words, path):
    "A random network in a folder of transformers."
    torch.manual_seed(0)
    if kind=='bert':
        c = transformers.BertConfig(vocab_size=words, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, max_position_embeddings=64)
        net = transformers.BertForMaskedLM(c)
    else:
        c = transformers.Mamba2Config(vocab_size=words, hidden_size=16, num_hidden_layers=2, head_dim=8, num_heads=4, state_size=4, n_groups=1, tie_word_embeddings=True, chunk_size=8)
        net = transformers.Mamba2ForCausalLM(c)
    net.save_pretrained(path)

@pytest.mark.parametrize('kind', THEIRS)
def test_finetune_on_their_folder(kind, here, capsys):
    "An adapter on a folder of transformers: the folder stays as it is, the run goes on, both sides answer alike, and scale 0 is the base."
    tok = train_tokenizer(movie_snippets('test').prompts[:40], 300)
    of_transformers(kind, len(tok), 'theirs'); tok.save('tok')
    before = {f: f.read_bytes() for f in Path('theirs').iterdir()}
    own = [f'--model={THEIRS[kind]}', '--data.tokenizer={name: tokenizer, path: tok}', '--data.room=8', '--train.averages={}', '--sample.average=null', '--train.steps=2',
           '--sample.narrow=null', '--train.lr={name: constant, lr: 3.0e-1}']
    def tune(out, *more): return good(['finetune', 'reviews.yaml', '--base', 'theirs', '--adapter', '{name: lora, rank: 2}', '--out', out, *own, *more], capsys)
    tune('run'); tune('parts', '--train.steps=1'); tune('parts')
    a, b = (load_tensors(f'{k}/adapter/adapter.safetensors')[0] for k in ('run', 'parts'))
    assert a.keys()==b.keys() and all((v==b[k]).all() for k,v in a.items()) and any(v.any() for k,v in a.items() if k.endswith('B'))
    assert not [k for k in a if 'in_proj' in k] or kind=='mamba2'
    def said(*words): return good(['sample', *words, '--n', '40', '--prompt', 'fine'], capsys).splitlines()
    on, off = said('theirs', '--adapter', 'run'), said('theirs', '--adapter', 'run', '--adapter-scale', '0')
    assert on==said('run')!=off and len(on)==40
    good(['train', 'reviews.yaml', '--out', 'none', *own, '--weights=theirs', '--train.steps=1', '--train.lr={name: constant, lr: 0.0}'], capsys)
    assert off==said('none') and before=={f: f.read_bytes() for f in Path('theirs').iterdir()} # a step of rate 0 leaves the folder's weights

WRONG = {
    'train reviews.yaml --model.name=diffit_tiny': 'no argument',
    'train reviews.yaml --data.room=null': 'data.room must say',
    'train reviews.yaml --data.room=64': 'no prompt has room',
    'train reviews.yaml --data.length=12': 'shorten it',
    'train reviews.yaml --data.given=4': 'data.given is for plain text',
    'train reviews.yaml --process.anchor=0.1': 'is for vectors',
    'train reviews.yaml --codec=pixels': 'has no codec',
    'train reviews.yaml --model.block=4': 'beside clean text',
    'train reviews.yaml --conditioner=minilm': 'no conditioner',
    'train reviews.yaml --data.set.path=gone': 'data.set.path: gone is not there',
    'train reviews.yaml --model.vocab=7': 'leave both out',
    'train reviews.yaml --process.schedule=poli': "did you mean 'poly'?",
    'train pages.yaml --data.length=100000': 'windows of 100000',
    'train pages.yaml --eval.metrics=[label_accuracy]': 'needs classes',
    'train dimba.yaml --process.self_cond=null': 'last estimate',
    'train dimba.yaml --data.given=16': 'data.given is 16',
    'train dimba.yaml --eval.metrics=[perplexity_bound]': 'is for masked_text',
    'train dimba.yaml --codec.name=token_codec --codec.vocab=9 --codec.dim=8': 'the tokenizer has',
}
@pytest.mark.parametrize('words', WRONG)
def test_mistakes(words, here, capsys):
    code, out, err = ask(words, capsys)
    assert code==2 and WRONG[words] in err and len(err.strip().splitlines())==1, err
    assert not Path('runs').exists()

def test_mistakes_in_asking(here, capsys):
    good('train reviews.yaml --out run --train.steps=1', capsys)
    Path('none.txt').write_text('\n \n')
    wrong = {'--y 1': 'asked by --prompt', '--prompt a --prompts ask.txt': 'not both', '--prompts none.txt': 'has no prompts', '--out a.png': '.txt or .jsonl',
             '--prompts gone.txt': 'gone.txt'}
    for words,why in wrong.items():
        code, _, err = ask(f'sample run {words}', capsys)
        assert code==2 and why in err and len(err.strip().splitlines())==1, err

def test_too_long_to_measure_is_wrong(here, capsys):
    "A held-out prompt that does not fit is answered by nothing, and counts."
    good('train reviews.yaml --out run --train.steps=1', capsys)
    Path('data').unlink(); Path('data').mkdir()
    rows = [dict(sentence='good', label=1), dict(sentence='good '*200, label=1)]
    Path('data/validation.jsonl').write_text(''.join(json.dumps(r)+'\n' for r in rows))
    good('eval run --metrics label_accuracy,unparsed', capsys)
    p = load_predictions('run/predictions.jsonl')
    assert len(p)==2 and p.texts[0] and not p.texts[1]
