"""HTTP access to sessions in the dialects of OpenAI, Anthropic and vLLM, for agents not written for rft.

The sessions stay in the controller, like those of other environments: it has the tokenizer, the
dispatch to replicas with its retries, and the pauses of weight syncs. The endpoint is a Ray actor on the
controller's node that knows nothing of models: it speaks HTTP on an event loop that no packing of a batch
delays, checks keys and requests, and hands each call over as an `Ask`. The controller fetches asks in
bunches (`take`), puts each to its session, and sends the answers back (`give`).

    agent --HTTP--> server (actor) --Ask--> handle (controller) --> Session.chat --> Fleet.generate
                          <-- dialect of the caller -- Answer --

types       Ask, Answer, Refused: all that crosses between the two processes
openai, anthropic, responses    dialects: a request to an Ask, an Answer to a response or a stream
server      routes, keys, limits, streams; knows no Ray
actor       the server in a Ray actor
handle      the controller's side: starts the actor, opens and closes sessions, answers asks
"""
