"diffnb bench: both sides compute the same, work is counted exactly, files and mistakes; times are looked at by pretended clocks alone."
import os, signal, time
from functools import partial
from pathlib import Path
import numpy as np
import pytest
import torch
from diffnb.bench import Ratio, apart, compare, exponent, growth, kept, operations, product, shown, turns
from diffnb.bench.training import GUIDE, QUICK, STEPS, falling, foreign, quality, share_of, train_for
from diffnb.core import create, presets
from diffnb.data.images import emoji, fashion_mnist
from diffnb.recipes import consistent, read
from shell import ask

class Clock:
    "A clock that moves when work is done."
    now = 0.
    def __call__(self): return self.now
    def work(self, seconds, result=None):
        def f(): self.now += seconds; return result() if result else None
        return f

CASES, GROWTHS = presets('benchmark'), presets('scale')

def test_every_library_is_there():
    "Those that issue and extra name."
    assert {f.facts['against'] for f in CASES.values()}=={'diffusers', 'transformers', 'peft', 'denoising-diffusion-pytorch', 'smalldiffusion'}
    assert set(GROWTHS)=={'resolution', 'tokens', 'batch', 'steps', 'ranks'}

@pytest.mark.parametrize('name', CASES)
def test_both_sides_compute_the_same(name):
    "Within 1e-4 of the spread: float32, and some sums in float64 on one side. Something is computed, and twice the same."
    ours, theirs = CASES[name](tiny=True)
    a, b = ours(), theirs()
    assert a.shape==b.shape and b.std()>0 and apart(ours, theirs)<1e-4
    assert torch.equal(ours(), a) and torch.equal(theirs(), b) # so that pairs repeat the same work

def test_operations_of_attention():
    "Four times n^2 d, whatever kernel would be chosen; torch's own count leaves the CPU's out."
    q = torch.randn(1, 2, 8, 16)
    assert operations(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))==4*2*8*8*16

def test_shares_of_the_limit():
    c, y = Clock(), torch.randn(16, 16)
    got = compare(c.work(4., lambda: y@y), c.work(2., lambda: y@y), 8, (c.work(1.), 2*16**3), c)
    assert [got[k].median for k in ('ratio', 'share', 'their_share')]==[2., .25, .5] and got['apart']==0
    got = compare(c.work(1., lambda: y+1), c.work(1., lambda: y+1), 8, (c.work(1.), 2*16**3), c)
    assert got['share'] is None and 'None' not in shown([dict(what='a', against='b', **got)])
    with pytest.raises(ValueError, match='different things'): compare(lambda: y, lambda: 2*y, 8, (c.work(1.), 1), c)

def test_turns_go_back_and_forth():
    "The order in a round alternates, and a round holds each once."
    seen = []
    def note(k): return lambda: seen.append(k)
    took = turns([note(k) for k in 'abc'], 6, warm=1)
    assert took.shape==(3, 6) and ''.join(seen)=='abc'+'abccba'*3
    with pytest.raises(ValueError, match='6 or more'): turns([print], 5)

def test_exponents():
    assert exponent([1, 2, 4], [3, 12, 48])==2. and exponent([1, 2], [0, 0]) is None
    with pytest.raises(ValueError, match='two sizes'): exponent([1], [1])
    c = Clock()
    got = growth({4: c.work(8.), 1: c.work(1.), 2: c.work(8**.5)}, 6, c)
    assert got['sizes']==[1, 2, 4] and np.allclose(got['cost'], [1, 8**.5, 8]) and abs(got['exponent']-1.5)<1e-3
    got = growth({n: product(n) for n in (8, 16)}, 6, clock=iter(range(10**6)).__next__)
    assert got['work']==[1., 8.] and got['work_exponent']==3.
    elsewhere = growth({1: lambda: 2., 4: lambda: 4.}, 6) # seconds that other processes took
    assert elsewhere['cost']==[1., 2.] and elsewhere['exponent']==.5 and elsewhere['work_exponent'] is None

def test_what_grows_counts_its_work():
    "Twice the steps, twice the operations; a batch shares its time, so a little less; tokens and sides more, by attention."
    got = {k: growth(GROWTHS[k](tiny=True), 6, clock=iter(range(10**6)).__next__) for k in ('steps', 'batch', 'tokens', 'resolution')}
    assert got['steps']['work']==[1., 2.] and got['steps']['work_exponent']==1.
    assert 1.95<got['batch']['work'][1]<2 and 4<got['tokens']['work'][1]<16
    assert 15<got['resolution']['work'][2]<256 and got['resolution']['work_exponent']>1.9

def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, _ = ask('bench', capsys)
    assert code==0 and all(k in out for k in [*CASES, *GROWTHS]) and not Path('bench').exists()
    threads = torch.get_num_threads()
    assert ask('bench ddim_steps --tiny --pairs 6 --out o', capsys)[0]==0
    code, out, _ = ask('bench small_walk,ddim_steps --tiny --pairs 6 --out o', capsys)
    rows = kept('bench', 'o')['rows']
    assert code==0 and [r['what'] for r in rows]==['ddim_steps', 'small_walk'] and torch.get_num_threads()==threads
    assert isinstance(rows[1]['ratio'], Ratio) and rows[1]['share'].median>0 and rows[0]['share'] is None and 'smalldiffusion' in out
    assert Path('o/bench.png').stat().st_size>1000
    assert ask('bench batch,steps --scale --tiny --pairs 6 --out o', capsys)[0]==0
    assert [r['what'] for r in kept('scale', 'o')['rows']]==['batch', 'steps'] and Path('o/scale.png').is_file()

@pytest.mark.parametrize('words, says', [('ddim_step', "did you mean 'ddim_steps'"), ('ddim_steps --pairs 5', '6 or more'), ('bach --scale', "did you mean 'batch'"),
                                         ('ddim_steps --out file', 'is a file')])
def test_mistakes_cost_a_line(tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    Path('file').write_text('')
    code, _, err = ask(f'bench {words} --tiny', capsys)
    assert code==2 and says in err and len(err.strip().splitlines())==1 and [p.name for p in tmp_path.iterdir()]==['file']

def test_ranks_need_all(monkeypatch):
    "A process that dies is an error, and not a number."
    from diffnb.bench import dit
    def dies(rank, world, place, tiny, out): os._exit(3)
    monkeypatch.setattr(dit, 'rank_work', dies)
    with pytest.raises(RuntimeError, match='could not train together'): dit.together(1, True)

# --- quality for time
def test_the_contest_is_entered_by_the_recipe_that_ships():
    r = consistent(read('fashion_quickstart'))
    assert r.sample.guide=={'name': 'interval', **GUIDE} and (r.sample.steps, r.sample.sampler['name'])==(STEPS, 'heun')
    assert (r.train.optimiser, r.train.lr['lr'])==({'name': 'muon'}, QUICK['lr']) and {k: getattr(r.train, k) for k in ('batch', 'drop')}=={k: QUICK[k] for k in ('batch', 'drop')}

def test_the_rate_follows_the_clock():
    c = Clock()
    share = share_of(10, c)
    rate = falling(2., share, warm=.1)
    seen = []
    for c.now in (0., .5, 1., 5.5, 10., 20.): seen.append(rate(0))
    cosine = [(1+np.cos(np.pi*s))/2 for s in (0, .05, .1, .55, 1, 1)]
    assert np.allclose(seen, [0., 1*cosine[1], 2*cosine[2], 2*cosine[3], 0., 0.]) and share()==1.

def test_training_ends_with_the_time_or_a_signal():
    "A signal must not pass for the end: its weights are those of a training cut short."
    net, images, c = partial(create, 'diffit_tiny', size=28, ch=1), fashion_mnist(), Clock()
    class Steps(Clock):
        def __call__(self): self.now += 1; return self.now
    assert 8<=train_for(net(), images, 15, batch=8, clock=Steps())[2]<=8*15
    class Kill(Steps):
        def __call__(self):
            if self.now>20: os.kill(os.getpid(), signal.SIGTERM); time.sleep(.01)
            return super().__call__()
    with pytest.raises(InterruptedError, match='SIGTERM'): train_for(net(), images, 1000, batch=8, clock=Kill())

def test_the_grid_picks_and_goes_on(tmp_path):
    "The better size of each family trains on, with each seed; cells that are there stay, one that is lost is made again."
    asked = []
    def contestant(k, gray):
        def enter(images, seconds, seed):
            asked.append((k, seconds, seed))
            g = torch.Generator().manual_seed(seed)
            def draw(i): return (images.pixels[i].float()*(1-gray)+gray*torch.rand(images.pixels[i].shape, generator=g)*255).to(torch.uint8)
            return 7, 64, draw
        return enter
    contest = {'a': {'bad': contestant('bad', .9), 'good': contestant('good', .1)}, 'b': {'only': contestant('only', .5)}}
    grid = partial(quality, 1., .5, 100, 80, (0, 3), contest, fashion_mnist(), tmp_path)
    rows = grid()
    assert asked==[('bad', 60, 0), ('good', 60, 0), ('only', 60, 0), ('good', 120, 0), ('only', 120, 0), ('good', 120, 3), ('only', 120, 3)]
    assert [r['stage'] for r in rows]==['trial']*3+['seed 0']*2+['seed 3']*2 and {r['n'] for r in rows}=={80, 100} and rows[1]['fid']<rows[0]['fid']
    page = (tmp_path/'quality.json').read_text()
    assert grid()==rows and len(asked)==7 and (tmp_path/'quality.json').read_text()==page

def test_the_other_library_trains_here():
    "Its loss, its average, its sampler: images of bytes, as many as asked for; the same for the same seed."
    from diffnb.bench.training import ddpm
    torch.manual_seed(0)
    count, seen, draw = foreign(partial(ddpm, 8), batch=2)(fashion_mnist(), .2, 0)
    assert count==sum(p.numel() for p in ddpm(8).model.parameters()) and seen>=2 and seen%2==0
    x = draw(torch.arange(2))
    assert x.dtype==torch.uint8 and x.shape==(2, 1, 28, 28)

def test_the_compiler_works_in_steps_that_do_not_count():
    "Three are not counted; the script has no compiler."
    from diffnb.bench.training import throughput
    from diffnb.bench.unet import dit_sides
    steps, made = [], []
    def sides():
        ours, theirs, call, told = dit_sides(1, 1)
        return ours, theirs, lambda *a: steps.append(1) or call(*a), told
    def note(graph, x): made.append(len(steps)); return graph.forward
    few = emoji().take(torch.arange(8))
    throughput(sides, few, 2, pairs=7)
    assert len(steps)==3+7 and not made
    throughput(sides, few, 2, backend=note, pairs=7)
    assert made and len(steps)==2*(3+7) and max(made)<10+3

def test_each_way_has_its_bound(monkeypatch, tmp_path):
    "A script's speed times 1.05 as the script, times 1.15 as we choose; the compiler is asked for the DiT alone."
    from diffnb.bench import training
    monkeypatch.setattr(training, 'throughput', lambda sides, images, **how: dict(sides=sides.__name__, how=how))
    want = dict(unet_sides=dict(chosen=True), dit_sides=dict(chosen=True, backend='inductor'))
    rows = [(r['sides'], r['how'], r['most']) for r in training.throughputs(folder=str(tmp_path))]
    assert rows==[o for k,v in want.items() for o in ((k, {}, 1/1.05), (k, v, 1/1.15))]

# --- many machines
def test_what_ranks_hold_and_send():
    "By hand, and against Adam's own state; in parts nothing is lost: the ranks together hold at least the whole."
    from diffnb.bench import state_bytes, traffic
    net = torch.nn.Linear(7, 5)
    n, opt = sum(p.numel() for p in net.parameters()), torch.optim.Adam(net.parameters())
    net(torch.ones(1, 7)).sum().backward(); opt.step()
    moments = sum(v.numel()*4 for s in opt.state.values() for k,v in s.items() if k!='step')
    assert state_bytes(n, averages=0)==dict(weights=4*n, gradients=4*n, optimiser=moments)
    for ranks in (1, 3, 4096): assert all(ranks*v>=w for v,w in zip(state_bytes(n, ranks).values(), state_bytes(n).values()))
    assert state_bytes(n, 3, 'none')==state_bytes(n) and state_bytes(9, 3, 'optimiser', 2)==dict(weights=18, gradients=18, optimiser=36)
    assert traffic(8, 1)==0 and traffic(8, 4, True)==12 and traffic(8, 4)==18
    with pytest.raises(ValueError, match='none, optimiser or all'): state_bytes(1, parts='some')

def test_a_dit_by_hand():
    "A block's 24nd^2+4n^2d and 12d^2 of modulations, in numbers and on the meta device alike."
    def count(depth, device):
        with torch.device(device): net = create('dit', depth=depth, dim=64, heads=2, size=8)
        x, t, cond = net.demo(1)
        with torch.no_grad(): return operations(lambda: net(x.to(device), t.float().to(device), **{k: v.to(device) for k,v in cond.items()}))
    for device in ('cpu', 'meta'): assert count(3, device)-count(1, device)==2*(24*16*64**2+4*16**2*64+12*64**2)
