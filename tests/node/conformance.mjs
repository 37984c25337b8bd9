// Drives a running service with the stock Node SDK, and prints what it saw as JSON.
//   node conformance.mjs BASE_URL
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
const model = "m";
const asks = (content) => [{ role: "user", content }];
const seen = {};

const chat = await client.chat.completions.create({ model, messages: asks("w1") });
seen.chat = chat.choices[0].message.content;

const refused = await client.chat.completions.create({ model, messages: asks("severe-violence") });
seen.refused = [refused.choices[0].message.content, refused.choices[0].finish_reason];

const stream = client.chat.completions.stream({ model, messages: asks("severe-violence") });
seen.refusedStream = await stream.finalContent();

seen.chunks = "";
for await (const chunk of await client.chat.completions.create({
  model, messages: asks("w1"), stream: true,
})) {
  seen.chunks += chunk.choices[0]?.delta?.content ?? "";
}

const schema = { type: "json_schema", json_schema: { name: "s", schema: { type: "object" } } };
const parsed = await client.chat.completions.parse({
  model, messages: asks("severe-violence"), response_format: schema,
});
seen.parsed = [parsed.choices[0].message.refusal, parsed.choices[0].message.parsed];

const moderated = await client.chat.completions.create({
  model, messages: asks("w1"), moderation: { model: "omni-moderation-latest" },
});
seen.moderation = moderated.moderation.input.type;

const response = await client.responses.create({ model, input: "severe-violence" });
seen.response = response.output_text;

const events = [];
for await (const event of client.responses.stream({ model, input: "severe-violence" })) {
  events.push(event.type);
}
seen.responseEvents = events;

const completion = await client.completions.create({ model, prompt: "severe-violence" });
seen.completion = completion.choices[0].text;

// --- Tools and choices
const letter = {
  type: "function",
  function: { name: "send", parameters: { type: "object", properties: { text: { type: "string" } } } },
};
const called = await client.chat.completions.create({ model, messages: asks("call"), tools: [letter] });
const [call] = called.choices[0].message.tool_calls;
seen.tool = [call.function.name, JSON.parse(call.function.arguments), called.choices[0].finish_reason];

const calling = client.chat.completions.stream({ model, messages: asks("call"), tools: [letter] });
const made = (await calling.finalChatCompletion()).choices[0].message.tool_calls[0];
seen.toolStream = [made.function.name, JSON.parse(made.function.arguments)];

const several = await client.chat.completions.create({ model, messages: asks("three"), n: 3 });
seen.choices = several.choices.map((choice) => choice.message.content);

const streamed = client.chat.completions.stream({ model, messages: asks("three"), n: 3 });
seen.choicesStream = (await streamed.finalChatCompletion()).choices.map((one) => one.message.content);

// --- Responses that are kept
const first = await client.responses.create({ model, input: "bad" });
const second = await client.responses.create({
  model, input: "w2", previous_response_id: first.id,
});
seen.turns = [first.output_text, second.output_text];
seen.readAgain = (await client.responses.retrieve(first.id)).output_text;
seen.inputItems = [];
for await (const item of client.responses.inputItems.list(second.id)) {
  seen.inputItems.push(item.content[0].text);
}
await client.responses.delete(first.id);
const format = { type: "json_schema", name: "s", schema: { type: "object" } };
const unparsed = await client.responses.parse({ model, input: "severe-violence", text: { format } });
seen.parsedResponse = [unparsed.output_parsed, unparsed.output[0].content[0].refusal];

// --- Embeddings
const vectors = await client.embeddings.create({ model, input: ["w1"], encoding_format: "float" });
seen.embedding = vectors.data[0].embedding;

// --- Errors
const image = [{ type: "image_url", image_url: { url: "http://x" } }];
const failing = {
  image: () => client.chat.completions.create({ model, messages: asks(image) }),
  many: () => client.chat.completions.create({ model, messages: asks("w1"), n: 0 }),
  route: () => client.audio.speech.create({ model, voice: "alloy", input: "w1" }),
  forgotten: () => client.responses.retrieve(first.id),
  background: () => client.responses.create({ model, input: "w1", background: true }),
  harmfulEmbedding: () => client.embeddings.create({ model, input: "severe-violence" }),
  malformed: () => client.chat.completions.create({ model, messages: asks("malformed") }),
  upstream400: () => client.chat.completions.create({ model, messages: asks("400") }),
  upstream429: () => client.chat.completions.create({ model, messages: asks("429") }),
  upstream500: () => client.chat.completions.create({ model, messages: asks("500"), stream: true }),
};
seen.errors = {};
for (const [name, ask] of Object.entries(failing)) {
  try {
    await ask();
    seen.errors[name] = null;
  } catch (error) {
    seen.errors[name] = [error.constructor.name, error.status, error.code, error.param];
  }
}

console.log(JSON.stringify(seen));
