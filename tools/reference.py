"How the site shows a function or class: a link to its source, signature, docstring and a table of its parameters."
import ast, importlib, inspect, textwrap, tokenize
from io import StringIO
from operator import attrgetter
from typing import NamedTuple
from nbdev import processors, showdoc
from nbdev.process import Processor

class Param(NamedTuple):
    "One parameter, or field, as it stands in the source."
    name:str       # with its stars
    anno:list      # the alternatives of its type: `A|B` is two
    default:str    # source of the default, or empty
    comment:str    # behind it
    @property
    def text(self): return self.name + (f':{"|".join(self.anno)}' if self.anno else '') + (f'={self.default}' if self.default else '')

def alternatives(src, o):
    "The source of a type, split at its outer bars."
    if o is None: return []
    if isinstance(o, ast.BinOp) and isinstance(o.op, ast.BitOr): return alternatives(src, o.left)+alternatives(src, o.right)
    return [ast.get_source_segment(src, o)]

def comments(src): # by line
    return {o.start[0]: o.string[1:].strip() for o in tokenize.generate_tokens(StringIO(src).readline) if o.type==tokenize.COMMENT}

def of_function(src, f, notes):
    "The parameters of the function `f`, and what it returns as a parameter without a name."
    a, end = f.args, f.returns.end_lineno if f.returns else 0
    pos = [*a.posonlyargs, *a.args]
    both = [*zip(pos, [None]*(len(pos)-len(a.defaults))+a.defaults), (a.vararg, None), *zip(a.kwonlyargs, a.kw_defaults), (a.kwarg, None)]
    stars = {a.vararg: '*', a.kwarg: '**'}
    res, lines = [], [(d or p).end_lineno for p,d in both if p]
    for p,d in both:
        if p is None or p.arg in ('self', 'cls'): continue
        line = (d or p).end_lineno
        note = notes.get(line, '') if lines.count(line)==1 and line!=end else '' # a comment behind several is nobody's
        res.append(Param(stars.get(p, '')+p.arg, alternatives(src, p.annotation), ast.get_source_segment(src, d) if d else '', note))
    return res, Param('', alternatives(src, f.returns), '', notes.get(end, '') if end else '')

def outline(sym):
    "Kind ('def' or 'class'), parameters and result of a function or class, read from its source."
    src = textwrap.dedent(inspect.getsource(inspect.unwrap(sym)))
    node, notes = ast.parse(src).body[0], comments(src)
    none = Param('', [], '', '')
    if not isinstance(node, ast.ClassDef): return 'def', *of_function(src, node, notes)
    if init := next((f for f in node.body if isinstance(f, ast.FunctionDef) and f.name=='__init__'), None):
        return 'class', of_function(src, init, notes)[0], none
    fields = [f for f in node.body if isinstance(f, ast.AnnAssign) and not f.target.id.startswith('_')] # what callers give
    def default(f): # `field(default=1, repr=False)` has the default 1
        kw = {k.arg: k.value for k in getattr(f.value, 'keywords', [])} if 'field' in ast.dump(getattr(f.value, 'func', ast.Pass())) else None
        o = f.value if kw is None else kw.get('default', kw.get('default_factory'))
        return ast.get_source_segment(src, o) if o else ''
    return 'class', [Param(f.target.id, alternatives(src, f.annotation), default(f), notes.get(f.end_lineno, '')) for f in fields], none

def signature(kind, name, params, returns, width=100):
    "The signature as code, packed into lines."
    head, tail = f'{kind} {name}(', ')'+(f'->{"|".join(returns.anno)}' if returns.anno else '')
    texts = [p.text for p in params]
    if kind=='class' and not params: return f'class {name}'
    if len(one := head+', '.join(texts)+tail)<=width: return one
    return head+'\n'+textwrap.fill(', '.join(o.replace(' ', '\0') for o in texts), width, initial_indent='    ',
        subsequent_indent='    ', break_long_words=False, break_on_hyphens=False).replace('\0', ' ')+'\n'+tail

def table(params, returns):
    "A Markdown table of what has a comment; a bar would end a cell, so it is written with a sign that looks like one."
    def cell(o): return o.replace('|', '∣')
    def code(o): return f'`{cell(o)}`' if o else ''
    rows = [(code(p.name), ' or '.join(map(code, p.anno)), code(p.default), cell(p.comment)) for p in params]
    if returns.comment: rows.append(('**Returns**', ' or '.join(map(code, returns.anno)), '', cell(returns.comment)))
    if not any(r[-1] for r in rows): return ''
    return '\n'.join('| '+' | '.join(r)+' |' for r in [('', 'Type', 'Default', 'Details'), ('---',)*4, *rows])

class Renderer(showdoc.BasicMarkdownRenderer):
    "What `show_doc` uses when the site is built. The symbol is that of the exported module, whose source can be read."
    module = None # of the notebook that is shown
    def __init__(self, sym, *args, **kw):
        super().__init__(sym, *args, **kw)
        try:
            self.sym = attrgetter(self.nm)(importlib.import_module(self.module)) if self.module else self.sym
            self.fn = f'{self.module}.{self.nm}'
        except (ImportError, AttributeError): pass # not exported
    def _repr_markdown_(self):
        o = getattr(self.sym, 'fget', None) or self.sym
        try: kind, params, returns = outline(o)
        except (OSError, TypeError, SyntaxError): return super()._repr_markdown_()
        link = showdoc.NbdevLookup().code(self.fn) or showdoc.NbdevLookup().code(self.nm)
        source = f'[source]({link}){{target="_blank" style="float:right; font-size:smaller"}}' if link else ''
        parts = ['---', source, '#'*self.title_level+f' {self.nm}', f'```python\n{signature(kind, self.nm, params, returns)}\n```',
                 self.docs, table(params, returns)]
        return '\n\n'.join(filter(None, parts))

class SourceAfter(Processor):
    "An exported cell's source follows the reference of all that it defines; nbdev puts it behind the first."
    def begin(self):
        cells = self.nb.cells
        for c in [c for c in cells if c.cell_type=='code' and 'exports' in c.directives_]:
            i = next(i for i,o in enumerate(cells) if o is c)
            while i+1<len(cells) and getattr(cells[i+1], 'has_sd', 0): cells[i], cells[i+1] = cells[i+1], cells[i]; i += 1

def install():
    "Take the place of nbdev's renderer, and show what a cell defines in the order in which it does."
    names = processors._def_names
    processors._def_names = lambda cell, shown: names(cell, shown)[::-1] # nbdev inserts each behind the cell
    processors.mv_exports = SourceAfter
    showdoc.BasicMarkdownRenderer = Renderer
