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

try {
  await client.chat.completions.create({
    model,
    messages: [{ role: "user", content: [{ type: "image_url", image_url: { url: "http://x" } }] }],
  });
} catch (error) {
  seen.image = [error.constructor.name, error.status, error.code, error.param];
}

console.log(JSON.stringify(seen));
