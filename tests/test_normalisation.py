"""What the mean of a loss is over: tokens, texts or the batch, as an option of the task; the gradient is that of the mean, however the batch is split."""
import pytest, torch
from torch import nn
from diffnb.core import Denoiser, Feats, Loss, mean_loss
from diffnb.process.masked import Masked
from diffnb.rng import Rng
from diffnb.survival import mean_of_texts, nats_per_text
from diffnb.train.loop import Options, Run, gradient
from diffnb.train.task import DiffusionTask, adam, by_batch, by_sample

V, N, B = 6, 10, 6
REDUCED = {None: mean_loss, by_sample: mean_of_texts, by_batch: nats_per_text}

class Tiny(Denoiser):
    def __init__(self):
        super().__init__()
        self.emb, self.out = nn.Embedding(V+1, 8), nn.Linear(8, V)
    def features(self, x, net_t, **cond): return Feats(self.emb(x)+self.emb(x).mean(1, keepdim=True))
    def head(self, feats): return self.out(feats.h)

def made(count):
    torch.manual_seed(0)
    return DiffusionTask(Tiny(), Masked('straight', V, V), optimiser=adam(), count=count)

def batch():
    return dict(x=(Rng(1).uniform(B, N)*V).long(), idx=torch.arange(B),
                mask=torch.arange(N)<torch.tensor([10, 1, 4, 7, 2, 10])[:,None], keep=torch.arange(N)<torch.tensor([3, 0, 1, 0, 2, 0])[:,None])

def grads(task): return torch.cat([p.grad.flatten() for p in task.denoiser.parameters()])

@pytest.mark.parametrize('parts', [1, 3, 6])
@pytest.mark.parametrize('count', REDUCED)
def test_the_gradient_is_that_of_the_mean(count, parts):
    "Against the reduction written out over the whole batch; text 4 is all prompt."
    ref, task = made(None), made(count)
    rng = Rng().at('train', step=0)
    want = REDUCED[count](ref.loss(ref.draw(batch(), rng), rng))
    want.backward()
    got, t, each = gradient(Run(task, task.optimiser(task.net), {}, Rng(), Options(accumulate=parts), None, None), batch(), torch.amp.GradScaler('cpu', enabled=False))
    assert got==pytest.approx(want.item(), rel=1e-5) and len(t)==len(each)==B
    assert (grads(task)-grads(ref)).abs().max()<1e-6*grads(ref).abs().max()+1e-7

def test_they_differ():
    loss = Loss(torch.tensor([[1., 3.], [5., 7.]]), torch.tensor([[True, True], [True, False]]), torch.zeros(2))
    got = [mean_loss(loss), *(mean_loss(f(loss)) for f in (by_sample, by_batch))]
    assert [round(o.item(), 6) for o in got]==[3, 3.5, 4.5]
    nothing = Loss(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool), torch.zeros(2))
    assert mean_loss(by_sample(nothing))==mean_loss(by_batch(nothing))==0
