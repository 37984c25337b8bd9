// Reads streams of a running service with the stock Node SDK, and prints what it saw as JSON.
//   node streams.mjs BASE_URL
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
const model = "m";
const asks = (content) => [{ role: "user", content }];
const letter = {
  type: "function",
  function: { name: "send", parameters: { type: "object", properties: { text: { type: "string" } } } },
};
const seen = {};

// What deltas said, what the final object says, and how it ends.
async function chat(content, more = {}) {
  const stream = client.chat.completions.stream({ model, messages: asks(content), ...more });
  let deltas = "";
  stream.on("content", (delta) => { deltas += delta; });
  const final = await stream.finalChatCompletion();
  return {
    deltas,
    texts: final.choices.map((choice) => choice.message.content),
    ends: final.choices.map((choice) => choice.finish_reason),
    calls: final.choices.flatMap((c) => c.message.tool_calls ?? []).map((c) => c.function.arguments),
    tokens: final.usage?.completion_tokens ?? null,
  };
}

for (const name of ["safe", "again", "exhausted", "blocked", "cut", "severe-violence", "slow", "crlf"]) {
  seen[name] = await chat(name);
}
seen.tool = await chat("tool", { tools: [letter] });
seen.cutTool = await chat("cut tool", { tools: [letter] });
seen.three = await chat("three", { n: 3, stream_options: { include_usage: true } });

async function response(input) {
  let deltas = "";
  let last = null;
  for await (const event of client.responses.stream({ model, input })) {
    if (event.type === "response.output_text.delta") deltas += event.delta;
    last = event;
  }
  const [item] = last.response.output;
  return { deltas, last: last.type, text: item.content[0].text, status: last.response.status };
}
seen.response = await response("safe");
seen.cutResponse = await response("cut");

async function completion(prompt) {
  const found = { text: "", end: null };
  for await (const chunk of await client.completions.create({ model, prompt, stream: true })) {
    found.text += chunk.choices[0]?.text ?? "";
    found.end = chunk.choices[0]?.finish_reason ?? found.end;
  }
  return found;
}
seen.completion = await completion("safe");
seen.cutCompletion = await completion("cut");

try {
  await chat("error");
  seen.error = null;
} catch (error) {
  seen.error = [error instanceof OpenAI.APIError, error.code];
}

const leaving = client.chat.completions.stream({ model, messages: asks("stall") });
leaving.on("content", () => leaving.abort());
try {
  await leaving.done();
} catch (error) {
  seen.left = error.constructor.name;
}

console.log(JSON.stringify(seen));
