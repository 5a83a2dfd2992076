"""An encoder behind HTTP: protocols that others' tools already speak.

engine.py    one model: texts → token ids → vectors and memory states
batcher.py   one thread that computes, a bounded queue before it
settings.py  what a server accepts; who may call it
refusals.py  what is refused, and in which protocol's shape it is told
schemas.py   requests and answers of OpenAI's and text-embeddings-inference's protocols
server.py    from a request's texts to their vectors: limits, deadlines, clients that left
metrics.py   what Prometheus is told
openai.py, tei.py, ranking.py, status.py, page.py   routes
page.html    the page
gate.py      keys, sizes and slow clients, before a route is called
app.py       all of it as one application; running it
"""
