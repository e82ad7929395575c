"The repository keeps the rules of `house.py`; and each rule is shown to fail where it is broken."
import json, re, subprocess
import pytest
from conftest import ROOT
from house import RULES, House

@pytest.fixture(scope='module')
def house(): return House(ROOT)

@pytest.mark.parametrize('name', RULES)
def test_rule(house, name):
    bad = list(RULES[name](house))
    assert not bad, f'{RULES[name].__doc__}\n  ' + '\n  '.join(bad)

# --- the rules themselves: a small house that keeps them all, and one thing broken at a time ---
PNG = 'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=='
SETTINGS = '[DEFAULT]\nreadme_nb = index.ipynb\nrequirements = torch>=2 torchvision fastcore jaxtyping\ntext_requirements = transformers\n'
END = '## Three things to remember\n\n## Exercises\n\n**1.** One.\n\n**2.** Two.'

def md(src): return dict(cell_type='markdown', source=src, metadata={}, id='a')
def code(src, *outputs): return dict(cell_type='code', source=src, metadata={}, id='a', execution_count=None, outputs=list(outputs))
def shown(**data): return dict(output_type='display_data', data={k.replace('_', '/', 1): v for k,v in data.items()}, metadata={})
def stream(name, text): return dict(output_type='stream', name=name, text=text)

def notebook(exp, *cells, num=0):
    "Cells of a notebook that keeps the rules, with `cells` in its middle."
    exports = num<80
    return [md(f'# {exp}\n\n> About {exp}'), *([code(f'#| default_exp {exp}')] if exports else []), md('Why.'),
            *cells, code('1+1', shown(image_png=PNG)), md(END), md('The end.'),
            *([code('#| hide\nimport nbdev; nbdev.nbdev_export()')] if exports else [])]

CORE = ('#| export\nfrom torch import nn', '#| export\nclass Denoiser(nn.Module):\n    "Base."\n    def null(self, x):\n        "Null."\n        return x\n'
        'class Thing:\n    "A thing."\n    x:int=0 # a field')
STEP = '#| export\ndef step(\n    x:int, # a number\n    y:Float[Tensor,\'b *d\']=None, # a tensor\n)->int: # the next\n    "One more."\n    return x+1'
STEP_IMPORTS = '#| export\nfrom jaxtyping import Float\nfrom torch import Tensor'

def nbs(**changed):
    "Notebooks by file name; `changed` adds cells to one: `core=[...]`."
    more = {k: [c if isinstance(c, dict) else code(c) for c in v] for k,v in changed.items()}
    res = {'00_core': notebook('core', *map(code, CORE), *more.get('core', [])),
           '11_process.gaussian': notebook('process.gaussian', code(STEP_IMPORTS), code(STEP), *more.get('gaussian', [])),
           '20_models.dit': notebook('models.dit', *more.get('dit', [])),
           '80_tour': notebook('Tour', *more.get('tour', []), num=80)}
    links = ' '.join(f'[x]({k}.ipynb)' for k in res)
    res['index'] = [md('# small\n\n> A small house'), md(links), *more.get('index', [])]
    return res

def build(root, notebooks, files=()):
    "Write a house: what `nbdev_export` would do, in three lines."
    (root/'nbs').mkdir(parents=True)
    (root/'settings.ini').write_text(SETTINGS)
    for name,cells in notebooks.items():
        (root/'nbs'/f'{name}.ipynb').write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
        exp = [m[1] for c in cells if (m := re.match(r'#\| default_exp (\S+)', c['source']))]
        if not exp: continue
        f = root/'diffnb'/(exp[0].replace('.', '/')+'.py')
        f.parent.mkdir(parents=True, exist_ok=True)
        f.write_text('\n\n'.join(c['source'] for c in cells if re.match(r'#\| exports?\n', c['source'])))
    for name,text in dict(files).items():
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        (root/name).write_text(text)
    return House(root)

def test_small_house(tmp_path):
    h = build(tmp_path/'h', nbs())
    assert {k: v for k,f in RULES.items() if (v := list(f(h)))}=={}

def fun(body, head='def f(\n    x:int, # a number\n):', doc='"Does."'): return '#| export\n'+head+'\n    '+'\n    '.join([doc, *body.split('\n')])
LONG = '\n'.join(f'a{i} = {i}' for i in range(41))
widget = {'application/vnd.jupyter.widget-view+json': {}}

OFFENDERS = [ # rule, what is changed, what the rule says
    ('file_names', dict(rename={'00_core': '00_kernel'}), '00_kernel.ipynb: exports core'),
    ('file_names', dict(rename={'00_core': 'core'}), 'not NN_'),
    ('file_names', dict(rename={'20_models.dit': '11_models.dit'}), 'has that number'),
    ('file_names', dict(tour=['#| default_exp tour']), 'a walkthrough exports nothing'),
    ('import_order', dict(core=['#| export\nfrom diffnb.models.dit import x']), 'core.py:'),
    ('import_order', dict(core=[fun('from .models import dit\nreturn dit')]), 'imports diffnb.models.dit'),
    ('import_order', dict(gaussian=['from diffnb.models.dit import *']), '11_process.gaussian.ipynb imports diffnb.models.dit'),
    ('import_order', dict(core=['import diffnb']), '00_core.ipynb imports diffnb'),
    ('import_order', dict(tour=['from diffnb.gone import x']), 'imports diffnb.gone'),
    ('apart', dict(dit=['#| export\nfrom diffnb.process.gaussian import step']), 'imports diffnb.process.gaussian'),
    ('apart', dict(core=[fun('import lightning\nreturn lightning')]), 'imports lightning'),
    ('light_imports', dict(core=['#| export\nimport torchvision']), 'imports torchvision'),
    ('light_imports', dict(core=['#| export\nfrom transformers import AutoModel']), 'imports transformers'),
    ('subclassing', dict(core=['#| export\nclass Other(Thing):\n    "Other."']), 'Other subclasses Thing'),
    ('top_level', dict(files={'notes.txt': ''}), 'notes.txt at the top level'),
    ('package_data', dict(files={'diffnb/table.csv': ''}), 'table.csv: not a module'),
    ('package_data', dict(files={'diffnb/loose.py': ''}), 'loose.py: no notebook exports it'),
    ('house_names', dict(core=[fun('return x', 'def helper(x:int):')]), 'name the thing it does'),
    ('house_names', dict(core=['#| export\nclass ModelManager:\n    "M."']), 'name the thing it does'),
    ('house_names', dict(files={'tests/utils.py': ''}), 'name the thing it does'),
    ('cell_length', dict(core=['#| export\n'+LONG]), 'a cell of 41 lines'),
    ('cell_length', dict(core=['#| export\nclass Net(nn.Module):\n    "N."\n    '+'\n    '.join(f'a{i} = {i}' for i in range(59))]), 'a cell of 61 lines'),
    ('function_length', dict(core=[fun('\n'.join(f'x += {i}' for i in range(27)))]), 'f has 31 lines'),
    ('module_length', dict(core=['#| export\n'+'\n'.join(f'b{j}_{i} = 0' for i in range(39)) for j in range(10)]), 'lines'),
    ('notebook_size', dict(core=[c for i in range(50) for c in (code('1'), md('a'))]), 'code cells'),
    ('notebook_size', dict(core=['1', '2', '3', '4', '5', '6', '7', '8']), 'text cells'),
    ('notebook_size', dict(core=[code('p()', shown(image_png='A'*140_000))]), 'a figure of 105 KB'),
    ('notebook_size', dict(core=[code('p()', shown(text_plain='A'*510_000))]), ' KB'),
    ('line_length', dict(core=['x = 1 # '+'a'*120]), '128 characters'),
    ('anatomy', dict(replace={'00_core': [md('Core')]}), 'the first cell is not'),
    ('anatomy', dict(replace={'00_core': notebook('core')[:1]+notebook('core')[2:]}), 'the second cell is not'),
    ('anatomy', dict(replace={'00_core': notebook('core')[:-1]}), 'the last cell is not the export'),
    ('anatomy', dict(replace={'00_core': [c for c in notebook('core') if c['source']!=END]}), 'no three things to remember'),
    ('anatomy', dict(replace={'00_core': [md(END.replace('**2.**', '')) if c['source']==END else c for c in notebook('core')]}), 'no two exercises'),
    ('anatomy', dict(replace={'00_core': [c for c in notebook('core') if not c.get('outputs')]}), 'no picture'),
    ('imports_alone', dict(core=['import math\nmath.pi']), 'imports and other code'),
    ('imports_alone', dict(core=['x = 1\nshow_doc(x)']), 'show_doc and other code'),
    ('explicit_imports', dict(core=['#| export\nfrom math import *']), 'import * in an exported cell'),
    ('nothing_hidden', dict(core=['#| hide\n1']), 'a hidden cell'),
    ('nothing_hidden', dict(core=[md('```python\n1\n```')]), 'fenced Python'),
    ('stored_outputs', dict(core=[code('w', dict(output_type='display_data', data=widget, metadata={}))]), 'a live widget'),
    ('stored_outputs', dict(core=[code('1/0', dict(output_type='error', ename='E', evalue='', traceback=[]))]), 'an error'),
    ('stored_outputs', dict(core=[code('w', stream('stderr', 'UserWarning'))]), 'stderr'),
    ('stored_outputs', dict(core=[code('w', stream('stdout', f'in {ROOT.home()}/x'))]), 'the path'),
    ('in_index', dict(replace={'index': [md('# small\n\n> A small house')]}), '00_core.ipynb is not linked'),
    ('no_global_state', dict(core=[fun('return x.cuda()')]), '.cuda()'),
    ('no_global_state', dict(core=[fun('torch.manual_seed(0)')]), 'torch.manual_seed()'),
    ('no_global_state', dict(core=[fun('np.random.seed(0)')]), 'np.random.seed'),
    ('no_global_state', dict(core=[fun('torch.set_default_dtype(x)')]), 'torch.set_default_dtype()'),
    ('no_global_state', dict(core=[fun('return torch.randn(x)')]), 'torch.randn without a generator'),
    ('no_global_state', dict(core=[fun('return random.random()')]), 'random.random'),
    ('no_pickle', dict(core=['#| export\nimport pickle']), 'imports pickle'),
    ('no_pickle', dict(core=[fun('return torch.load(x)')]), 'torch.load without'),
    ('no_pickle', dict(core=[fun('return torch.load(x, weights_only=False)')]), 'torch.load without'),
    ('no_pickle', dict(core=[fun('return np.load(x, allow_pickle=True)')]), 'np.load'),
    ('no_pickle', dict(core=[fun('return eval(x)')]), 'eval'),
    ('no_isinstance', dict(gaussian=[fun('return isinstance(x, (int, core.Thing))')]), 'isinstance(..., core.Thing)'),
    ('no_switches', dict(core=[fun("return x if mode=='eps' else 0", 'def f(\n    x:int, # a number\n    mode:str, # which\n):')]), 'compares mode with a string'),
    ('names_defined', dict(core=[fun('return gone')]), "undefined name 'gone'"),
    ('names_defined', dict(core=['#| export\nimport math']), 'imported but unused'),
    ('said_once', dict(core=[fun('y = x\nz = y\nreturn z')], dit=[fun('y = x\nz = y\nreturn z', doc='"Other words."')]), 'f again'),
    ('documented', dict(core=[fun('return x', doc='1')]), 'f has no docstring'),
    ('documented', dict(core=[fun('return x', 'def f(x:int):')]), 'f: no comment on x'),
    ('documented', dict(core=[fun('return x', "def f(x:int, # '#'\n    y:str='#', z:int=1, # last\n):")]), 'f: no comment on y'),
    ('documented', dict(core=['#| export\nclass C:\n    "A class."\n    def go(self): return 1']), 'C.go has no docstring'),
    ('documented', dict(core=['#| export\nclass C:\n    "A class."\n    x:int=0']), 'C.x has no comment'),
]

@pytest.mark.parametrize('i', range(len(OFFENDERS)), ids=[f'{o[0]}-{i}' for i,o in enumerate(OFFENDERS)])
def test_rule_fails(tmp_path, i):
    name, change, says = OFFENDERS[i]
    change = dict(change)
    files, rename, replace = change.pop('files', {}), change.pop('rename', {}), change.pop('replace', {})
    books = {rename.get(k, k): replace.get(k, v) for k,v in nbs(**change).items()}
    bad = list(RULES[name](build(tmp_path/'h', books, files)))
    assert any(says in o for o in bad), bad

def test_every_rule_can_fail(): assert {o[0] for o in OFFENDERS}==set(RULES)

# --- README ---
@pytest.mark.parametrize('part', ['Install', 'Test'])
def test_readme_command(part):
    "`.ci/run` runs the commands that README gives: there is one of each."
    out = subprocess.run(['bash', '.ci/run', '--show', part], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.search(rf'^## {part}\n(?:(?!^## ).*\n)*?```sh\n{re.escape(out.strip())}\n```', (ROOT/'README.md').read_text(), re.MULTILINE)
    assert len(out.split('\n'))==2 and out.strip()
