"""The server: OpenAI's completions and chat completions, from one batching engine.  `minirec serve` starts it.

       clients            event loop                                  engine's thread
    POST /v1/...  --->  protocol: check it   --->  inbox  --->  submit, cancel
                        answers: text, stop  <--- updates <---  step, step, step ...
    SSE or JSON   <---  app: write it

The engine runs in a thread of its own and never waits for anyone: what it has made is put into the mailbox of its
request, which holds at most the tokens that the request may have.  Everything else runs in one event loop, which writes
to each client as fast as that client reads.

    protocol.py   what a client asks: OpenAI's fields, and this server's own
    worker.py     the thread with the engine, and what goes in and out of it
    answers.py    from tokens to text: stop strings, log-probabilities, OpenAI's objects
    metrics.py    what Prometheus reads
    app.py        routes, limits, errors, streams
    process.py    the process: signals and sockets

It needs the extra `serve`: starlette, uvicorn, prometheus-client.
"""
