"""The rules of the house that a machine can hold. Each rule is a function of a `House` that gives one line for each fault.

`test_house.py` applies them to the repository, and shows for each that it can fail.
"""
import ast, base64, configparser, copy, functools, json, re, subprocess, sys, tempfile
from pathlib import Path
from pyflakes.checker import Checker
from pyflakes import messages

RULES = {} # name -> function
def rule(f):
    RULES[f.__name__] = f
    return f

def lines(src): return [o for o in src.splitlines() if o.strip() and not o.startswith('#|')]

class Cell:
    "One cell: its source, its directives (`#| name args`) and outputs."
    def __init__(self, d):
        self.kind, self.src, self.outputs = d['cell_type'], ''.join(d['source']), d.get('outputs', [])
        self.flags = {m[1]: m[2].strip() for m in re.finditer(r'^#\|\s*([\w]+):?(.*)$', self.src, re.MULTILINE)}
        self.code = self.kind=='code'
        self.exported = self.code and bool({'export', 'exports', 'exporti'} & self.flags.keys())
        self.last = 'nbdev_export()' in self.src # the cell that writes the module
    @functools.cached_property
    def tree(self): return ast.parse(re.sub(r'^\s*[%!].*$', '', self.src, flags=re.MULTILINE)) if self.code else ast.Module([], [])

class Notebook:
    def __init__(self, path):
        self.path, self.name, self.stem = path, path.name, path.stem
        d = json.loads(path.read_text(encoding='utf-8'))
        self.meta, self.cells = d['metadata'], [Cell(c) for c in d['cells']]
        self.code = [c for c in self.cells if c.code]
        self.text = '\n\n'.join(c.src for c in self.cells if c.kind=='markdown')
        m = re.match(r'(\d\d|1\d\d)_', self.name)
        self.num = int(m[1]) if m else None # the index has no number
        self.exp = next((c.flags['default_exp'] for c in self.code if 'default_exp' in c.flags), None)
    @property
    def walk(self): return self.num is not None and 80<=self.num<=86 # a walkthrough
    @property
    def module(self): return f'diffnb.{self.exp.removesuffix(".__init__")}' if self.exp else None

class Module:
    def __init__(self, root, path):
        self.path, self.rel = path, path.relative_to(root).as_posix()
        self.package = path.name=='__init__.py'
        self.name = self.rel.removesuffix('.py').removesuffix('/__init__').replace('/', '.')
        self.src = path.read_text(encoding='utf-8')
        self.tree = ast.parse(self.src)
    def base(self, level):
        "What a relative import of so many dots starts from."
        parts = self.name.split('.')
        return '.'.join(parts[:len(parts)-level+self.package]) if level else ''

class House:
    "A repository: its notebooks, the modules that they export, its settings."
    def __init__(self, root):
        self.root = Path(root)
        self.nbs = [Notebook(f) for f in sorted((self.root/'nbs').glob('[!.]*.ipynb'))]
        self.by_module = {o.module: o for o in self.nbs if o.module}
        files = sorted((self.root/'diffnb').rglob('*.py'))
        self.modules = [o for f in files if (o := Module(self.root, f)).name in self.by_module]
        cfg = configparser.ConfigParser(delimiters=['='])
        cfg.read(self.root/'settings.ini')
        self.cfg = cfg['DEFAULT'] if cfg.defaults() else {}
    def defs(self, *types):
        for m in self.modules:
            for o in ast.walk(m.tree):
                if isinstance(o, types): yield m, o
    def requirements(self, extras=True):
        keys = [k for k in self.cfg if k=='requirements' or extras and k.endswith('_requirements')]
        names = [re.split(r'[\[<>=!~]', w)[0] for k in keys for w in self.cfg[k].split()]
        return {dict(pillow='pil', pyyaml='yaml').get(n := o.lower().replace('-', '_'), n) for o in names}
    @functools.cached_property
    def classes(self): return {o.name for _,o in self.defs(ast.ClassDef)}

def dotted(o):
    "`a.b.c` of a name or an attribute."
    if isinstance(o, ast.Name): return o.id
    return f'{dotted(o.value)}.{o.attr}' if isinstance(o, ast.Attribute) else ''

def imports(tree, house, module=None):
    "The modules that `tree` imports, by dotted name, with the node."
    known = {*house.by_module, 'diffnb'}
    for o in ast.walk(tree):
        if isinstance(o, ast.Import):
            for a in o.names: yield a.name, o
        elif isinstance(o, ast.ImportFrom):
            base = '.'.join(filter(None, [module.base(o.level) if module else '', o.module]))
            for a in o.names:
                if (base, a.name)!=('diffnb', '__version__'): yield (f'{base}.{a.name}' if f'{base}.{a.name}' in known else base), o
        elif isinstance(o, ast.Call) and dotted(o.func).split('.')[-1]=='import_module' and o.args and isinstance(o.args[0], ast.Constant):
            if '.' in str(o.args[0].value): yield o.args[0].value, o # `import_module('diffnb')` asks where the package lies

# --- names and order ---
@rule
def file_names(h):
    "NN_dotted.module.ipynb (from 100 on NNN_) exports dotted.module; no number twice; walkthroughs (80 to 86) export nothing."
    seen = {}
    for o in h.nbs:
        if o.name==h.cfg.get('readme_nb', 'index.ipynb'):
            if o.exp: yield f'{o.name}: the index exports nothing'
            continue
        if o.num is None or not re.fullmatch(r'(\d\d|1\d\d)_[a-z0-9_]+(\.[a-z0-9_]+)*', o.stem): yield f'{o.name}: not NN_dotted.module.ipynb'; continue
        if o.num in seen: yield f'{o.name}: {seen[o.num]} has that number'
        seen[o.num] = o.name
        if o.walk:
            if o.exp: yield f'{o.name}: a walkthrough exports nothing'
        elif o.stem.split('_', 1)[1]!=(o.exp or '').removesuffix('.__init__'): yield f'{o.name}: exports {o.exp}'

@rule
def import_order(h):
    """A notebook imports only from lower-numbered ones; the package itself, which offers everything, from chapter 7 on.
    From 87 on are parts that found no free number, so walkthroughs, which nothing imports, may use them."""
    def bad(nb, name):
        if name=='diffnb': return nb.num is not None and nb.num<70
        to = h.by_module.get(name)
        if to is None: return name.startswith('diffnb.')
        return nb.num is not None and to.num>=nb.num and not (nb.walk and to.num>86)
    for m in h.modules:
        for name,o in imports(m.tree, h, m):
            if bad(h.by_module[m.name], name): yield f'{m.rel}:{o.lineno} imports {name}'
    for nb in h.nbs:
        for c in nb.code:
            for name,_ in imports(c.tree, h):
                if bad(nb, name): yield f'{nb.name} imports {name}'

APART = {'diffnb.models': ['diffnb.process', 'diffnb.samplers', 'diffnb.schedules', 'diffnb.guidance'],
         'diffnb.process': ['diffnb.models'], 'diffnb.samplers': ['diffnb.models'], 'diffnb.train': ['diffnb.metrics'],
         'diffnb.peft': ['diffnb.process', 'diffnb.samplers', 'diffnb.models']}
def within(name, part): return name==part or name.startswith(part+'.')

@rule
def apart(h):
    "Models never import processes, processes never models, adapters know layers but neither, training no metrics; nobody imports Lightning."
    for m in h.modules:
        for name,o in imports(m.tree, h, m):
            if name=='diffnb.models.layers' and m.name.startswith('diffnb.peft'): continue
            for part,others in APART.items():
                if within(m.name, part) and any(within(name, p) for p in others): yield f'{m.rel}:{o.lineno} imports {name}'
            if m.name!='diffnb.train.lightning' and (within(name, 'lightning') or name=='diffnb.train.lightning'):
                yield f'{m.rel}:{o.lineno} imports {name}'

@rule
def light_imports(h):
    "At the top of a module stand the light requirements alone: torchvision and the extras are imported where they are used."
    light = h.requirements(extras=False)-{'torchvision'}
    for m in h.modules:
        for o in m.tree.body:
            if not isinstance(o, (ast.Import, ast.ImportFrom)) or getattr(o, 'level', 0): continue
            for name in [a.name for a in o.names] if isinstance(o, ast.Import) else [o.module]:
                top = name.split('.')[0]
                if top!='diffnb' and top not in sys.stdlib_module_names and top.lower() not in light: yield f'{m.rel}:{o.lineno} imports {name}'

@rule
def subclassing(h):
    "`Denoiser`, `Codec` and `Conditioner` are the only classes of ours that are subclassed (exceptions and tuples aside)."
    errors = {o.name for _,o in h.defs(ast.ClassDef) if any(re.search('Error|Exception|Warning$', dotted(b)) for b in o.bases)}
    for m,o in h.defs(ast.ClassDef):
        for b in map(dotted, o.bases):
            if b in h.classes-errors-{'Denoiser', 'Codec', 'Conditioner'}: yield f'{m.rel}:{o.lineno} {o.name} subclasses {b}'

ALLOWED = '''nbs diffnb tests tools settings.ini setup.py README.md _quarto.yml index_files LICENSE MANIFEST.in pyproject.toml
    pytest.ini .gitignore .ci .github'''.split()

@rule
def top_level(h):
    "Nothing at the top but what design and tools need."
    if (h.root/'.git').exists():
        out = subprocess.run(['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'], cwd=h.root, capture_output=True, text=True, check=True)
        names = {o.split('/')[0] for o in out.stdout.split('\0') if o}
    else: names = {o.name for o in h.root.iterdir()}
    for o in sorted(names-set(ALLOWED)): yield f'{o} at the top level'

@rule
def package_data(h):
    "In the package: modules that notebooks export, and data files in datasets, recipes and trained."
    for f in (h.root/'diffnb').rglob('*'):
        rel = f.relative_to(h.root/'diffnb')
        if f.is_dir() or '__pycache__' in rel.parts or rel.parts[0] in ('datasets', 'recipes', 'trained'): continue
        if f.suffix!='.py': yield f'{rel}: not a module'
        elif f.name not in ('__init__.py', '_modidx.py') and Module(h.root, f).name not in h.by_module: yield f'{rel}: no notebook exports it'

@rule
def house_names(h):
    "Nothing is called utils, helpers or manager."
    bad = re.compile(r'(^|[_.\W])(utils?|helpers?|manager|misc|common)($|[_.\W])', re.IGNORECASE)
    for o in [*(n.path for n in h.nbs), *(m.path for m in h.modules), *(h.root/'tests').glob('*.py'), *(h.root/'tools').glob('*.py')]:
        if bad.search(o.name): yield f'{o.name}: name the thing it does'
    for m,o in h.defs(ast.FunctionDef, ast.ClassDef):
        if bad.search(o.name) or re.search('Manager|Utils|Helper', o.name): yield f'{m.rel}:{o.lineno} {o.name}: name the thing it does'

# --- budgets ---
NETS = re.compile(r'(Module|Denoiser|Codec|Conditioner)$')
def is_net(o): return isinstance(o, ast.ClassDef) and any(NETS.search(dotted(b)) for b in o.bases)

@rule
def cell_length(h):
    "An exported cell has at most 40 lines, one with an nn.Module 60."
    for nb in h.nbs:
        for c in nb.code:
            top = 60 if any(map(is_net, c.tree.body)) else 40
            if c.exported and (n := len(lines(c.src)))>top: yield f'{nb.name}: a cell of {n} lines: {lines(c.src)[0][:60]}'

@rule
def function_length(h):
    "A function has at most 30 lines: the signature's included, an inner function's too."
    for m,o in h.defs(ast.FunctionDef, ast.AsyncFunctionDef):
        n = o.end_lineno-o.lineno+1
        if n>30: yield f'{m.rel}:{o.lineno} {o.name} has {n} lines'

@rule
def module_length(h):
    "A generated module has at most 350 lines."
    for m in h.modules:
        if (n := m.src.count('\n')+1)>350: yield f'{m.rel} has {n} lines'

@rule
def notebook_size(h):
    "At most 50 code cells, at least one text cell to two of code, 500 KB on disk, figures of 100 KB."
    for nb in h.nbs:
        n, text = len(nb.code), sum(c.kind=='markdown' for c in nb.cells)
        if n>50: yield f'{nb.name}: {n} code cells'
        if 2*text<n: yield f'{nb.name}: {n} code cells and {text} text cells'
        if (kb := nb.path.stat().st_size/1000)>500: yield f'{nb.name}: {kb:.0f} KB'
        for c in nb.code:
            for o in c.outputs:
                for mime,data in o.get('data', {}).items():
                    if not mime.startswith('image/'): continue
                    data = ''.join(data)
                    size = len(data) if 'svg' in mime else len(base64.b64decode(data))
                    if size>100_000: yield f'{nb.name}: a figure of {size/1000:.0f} KB: {c.src[:60]}'

@rule
def line_length(h):
    "Lines of code have at most 120 characters."
    for nb in h.nbs:
        for c in nb.code:
            for o in c.src.splitlines():
                if len(o)>120: yield f'{nb.name}: {len(o)} characters: {o[:60]}'

# --- notebooks ---
@rule
def anatomy(h):
    "Title and description, `default_exp`, text, ...; at the end three things to remember and two exercises; the export."
    for nb in h.nbs:
        first = nb.cells[0]
        if first.kind!='markdown' or not re.match(r'# \S.*\n+> \S', first.src): yield f'{nb.name}: the first cell is not `# title` and `> description`'
        if nb.num is None or nb.num>=80: continue
        if not any('default_exp' in c.flags for c in nb.cells[1:2]): yield f'{nb.name}: the second cell is not `#| default_exp`'
        if not nb.cells[-1].last: yield f'{nb.name}: the last cell is not the export'
        if not re.search('three things to remember', nb.text, re.IGNORECASE): yield f'{nb.name}: no three things to remember'
        if len(re.findall(r'^\W*(?:exercise )?[12]\W', re.split('(?im)^#+ *exercises?', nb.text)[-1], re.MULTILINE | re.IGNORECASE))<2: yield f'{nb.name}: no two exercises'
        if not any('image/png' in o.get('data', {}) for c in nb.code for o in c.outputs): yield f'{nb.name}: no picture'

@rule
def imports_alone(h):
    "Imports live alone in their cells: the docs run such cells. `show_doc` too."
    for nb in h.nbs:
        for c in nb.code:
            kinds = {isinstance(o, (ast.Import, ast.ImportFrom)) for o in c.tree.body}
            if not c.last and len(kinds)>1: yield f'{nb.name}: imports and other code in one cell: {lines(c.src)[0][:60]}'
            shows = {isinstance(o, ast.Expr) and isinstance(o.value, ast.Call) and dotted(o.value.func)=='show_doc' for o in c.tree.body}
            if len(shows)>1: yield f'{nb.name}: show_doc and other code in one cell: {lines(c.src)[0][:60]}'

@rule
def explicit_imports(h):
    "Exported cells import by name."
    for nb in h.nbs:
        for c in nb.code:
            if c.exported and any(isinstance(o, ast.ImportFrom) and o.names[0].name=='*' for o in ast.walk(c.tree)): yield f'{nb.name}: import * in an exported cell'

@rule
def nothing_hidden(h):
    "No cell is hidden but the export; no code stands fenced in text, where nothing runs it."
    for nb in h.nbs:
        for c in nb.code:
            if {'hide', 'hide_input'} & c.flags.keys() and not c.last: yield f'{nb.name}: a hidden cell: {lines(c.src)[0][:60]}'
        if re.search(r'^\s*(```|~~~)\s*\{?\.?(python|py)\b', nb.text, re.MULTILINE): yield f'{nb.name}: fenced Python in a text cell'

@rule
def stored_outputs(h):
    "Stored outputs hold no widget, error, warning or path of one machine."
    here = re.compile('|'.join(re.escape(str(o)) for o in {h.root.resolve(), Path.home(), Path(sys.prefix), Path(tempfile.gettempdir())})+r'|/site-packages/')
    for nb in h.nbs:
        if 'widgets' in nb.meta: yield f'{nb.name}: widget state'
        for c in nb.code:
            for o in c.outputs:
                data = o.get('data', {})
                text = ''.join(o.get('text', [])) + ''.join(''.join(v) for k,v in data.items() if k.startswith('text/'))
                where = f'{nb.name}: {(lines(c.src) or [""])[0][:60]}'
                if 'application/vnd.jupyter.widget-view+json' in data: yield f'{where}: a live widget'
                if o['output_type']=='error': yield f'{where}: an error'
                if o.get('name')=='stderr': yield f'{where}: stderr'
                if m := here.search(text): yield f'{where}: the path {m[0]}'

@rule
def in_index(h):
    "The index links every notebook."
    index = next((o for o in h.nbs if o.num is None), None)
    for nb in h.nbs:
        if nb.num is not None and (not index or f'({nb.name})' not in index.text): yield f'{nb.name} is not linked from the index'

# --- exported code ---
GLOBAL = re.compile(r'(torch|np|numpy|random)(\.cuda|\.random|\.mps)?\.(manual_seed(_all)?|seed|set_default_\w+|set_rng_state|set_printoptions)')
DRAWS = {f'torch.{o}' for o in 'randn rand randint randperm bernoulli multinomial normal randn_like rand_like randint_like'.split()}

@rule
def no_global_state(h):
    "No `.cuda()`, no global seed or default, no draw from a global generator."
    for m,o in h.defs(ast.Call):
        name = dotted(o.func)
        if isinstance(o.func, ast.Attribute) and o.func.attr=='cuda': yield f'{m.rel}:{o.lineno} .cuda()'
        if GLOBAL.fullmatch(name): yield f'{m.rel}:{o.lineno} {name}()'
        if name in DRAWS and not any(k.arg=='generator' for k in o.keywords): yield f'{m.rel}:{o.lineno} {name} without a generator'
        if re.match(r'(np|numpy)\.random\.(?!Philox|Generator|SeedSequence)|random\.(?!Random)', name): yield f'{m.rel}:{o.lineno} {name}'

@rule
def no_pickle(h):
    "Nothing reads or writes pickles, and nothing evaluates text."
    for m,o in h.defs(ast.Import, ast.ImportFrom):
        for n in [a.name for a in o.names] if isinstance(o, ast.Import) else [o.module]:
            if n in ('pickle', 'cPickle', 'dill', 'joblib', 'shelve', 'cloudpickle'): yield f'{m.rel}:{o.lineno} imports {n}'
    for m,o in h.defs(ast.Call):
        name, kw = dotted(o.func), {k.arg: getattr(k.value, 'value', None) for k in o.keywords}
        if name=='torch.load' and kw.get('weights_only') is not True: yield f'{m.rel}:{o.lineno} torch.load without weights_only=True'
        if name in ('torch.save', 'eval', 'exec') or kw.get('allow_pickle') is True: yield f'{m.rel}:{o.lineno} {name}'

@rule
def no_isinstance(h):
    "Code asks what an object does, not which of our classes it is."
    for m,o in h.defs(ast.Call):
        if dotted(o.func) in ('isinstance', 'issubclass') and len(o.args)==2:
            for c in ast.walk(o.args[1]):
                if dotted(c).split('.')[-1] in h.classes: yield f'{m.rel}:{o.lineno} isinstance(..., {dotted(c)})'

@rule
def no_switches(h):
    "No string parameter selects an algorithm: pass the function."
    words = {'mode', 'method', 'variant', 'algorithm', 'solver', 'prediction_type', 'pred', 'loss_type', 'objective', 'backend'}
    for m,f in h.defs(ast.FunctionDef):
        params = {a.arg for a in [*f.args.args, *f.args.kwonlyargs]} & words
        for o in ast.walk(f):
            if isinstance(o, ast.Compare) and isinstance(o.left, (ast.Name, ast.Attribute)) and any(isinstance(c, ast.Constant) and isinstance(c.value, str) for c in o.comparators):
                n = dotted(o.left)
                if n in params or n.startswith('self.') and n[5:] in words: yield f'{m.rel}:{o.lineno} compares {n} with a string'

class Shapes(ast.NodeTransformer):
    "Takes the axes out of `Float[Tensor, 'b *d']`, which pyflakes would read as code."
    def visit_Subscript(self, o):
        two = isinstance(o.slice, ast.Tuple) and len(o.slice.elts)==2
        if two and dotted(o.slice.elts[0]).split('.')[-1] in ('Tensor', 'ndarray', 'Array'): o.slice = o.slice.elts[0]
        return self.generic_visit(o)

@rule
def names_defined(h):
    "Every name that a module uses is defined, and every import used (pyflakes)."
    for m in h.modules:
        methods = {f.lineno-len(f.decorator_list) for f in m.tree.body if isinstance(f, ast.FunctionDef) and patched(f)}
        for o in Checker(Shapes().visit(copy.deepcopy(m.tree)), m.rel).messages:
            if isinstance(o, messages.RedefinedWhileUnused) and methods & {o.lineno, o.lineno-1}: continue # of two classes
            yield f'{m.rel}:{o.lineno} {o.message % o.message_args}'

@rule
def said_once(h):
    "No function or class is written twice."
    seen = {}
    for m,o in h.defs(ast.FunctionDef, ast.ClassDef):
        body = o.body[1:] if ast.get_docstring(o) is not None else o.body
        dump = ast.dump(ast.Module([getattr(o, 'args', ast.Pass()), *body], []))
        if sum(isinstance(n, ast.stmt) for b in body for n in ast.walk(b))<3: continue
        if dump in seen: yield f'{m.rel}:{o.lineno} {o.name} is {seen[dump]} again'
        seen.setdefault(dump, f'{m.rel}:{o.lineno} {o.name}')

def params(f):
    "The parameters of a function with the place where each ends, default included; not self."
    a = f.args
    pos = [*a.posonlyargs, *a.args]
    both = [*zip(pos, [None]*(len(pos)-len(a.defaults))+a.defaults), *zip(a.kwonlyargs, a.kw_defaults), (a.vararg, None), (a.kwarg, None)]
    for p,d in both:
        if p is not None and p.arg not in ('self', 'cls'): yield p, (d or p).end_lineno, (d or p).end_col_offset

def undocumented(m, f):
    "The parameters of `f` that do not end their line with a comment."
    src = m.src.splitlines()
    for p,line,col in params(f):
        rest = src[line-1].encode()[col:].decode()
        if not re.match(r'\s*,?\s*(\)\s*(->[^#]*)?:)?\s*#\s*\S', rest): yield p.arg

def patched(o): return any(dotted(getattr(d, 'func', d))=='patch' for d in o.decorator_list)

@rule
def documented(h):
    "Public functions and classes have a docstring; each parameter (and field) stands on a line of its own with a comment."
    bases = [o for _,o in h.defs(ast.ClassDef) if o.name in ('Denoiser', 'Codec', 'Conditioner')]
    known = {f.name for o in bases for f in o.body if isinstance(f, ast.FunctionDef)} # said once, at the base
    def public(o): return not o.name.startswith('_')
    for m in h.modules:
        for o in m.tree.body:
            if not isinstance(o, (ast.FunctionDef, ast.ClassDef)) or not public(o) or patched(o) and o.name in known: continue
            where, inner = f'{m.rel}:{o.lineno} {o.name}', []
            if not ast.get_docstring(o): yield f'{where} has no docstring'
            if isinstance(o, ast.ClassDef):
                inner = [f for f in o.body if isinstance(f, ast.FunctionDef)]
                for f in inner:
                    own = f.name!='forward' and (o in bases or f.name not in known)
                    if public(f) and own and not ast.get_docstring(f): yield f'{where}.{f.name} has no docstring'
                fields = [f for f in o.body if isinstance(f, ast.AnnAssign) and not f.target.id.startswith('_')]
                for f in fields:
                    if '#' not in m.src.splitlines()[f.end_lineno-1].encode()[f.end_col_offset:].decode(): yield f'{where}.{f.target.id} has no comment'
            for f in [o] if isinstance(o, ast.FunctionDef) else [f for f in inner if f.name=='__init__']:
                if bad := list(undocumented(m, f)): yield f'{m.rel}:{f.lineno} {o.name}: no comment on {", ".join(bad)}'
