// What a Node program does with the official SDK: chat, several pictures, a stream; prints what came back.
// Usage: node ask.mjs URL GOOD.png DEFECT.png
import { readFile } from "node:fs/promises";
import OpenAI from "openai";

const [url, ...paths] = process.argv.slice(2);
const client = new OpenAI({ baseURL: url, apiKey: "none", maxRetries: 0 });
const model = (await client.models.list()).data[0].id;

const pictures = await Promise.all(
  paths.map(async (path) => ({
    type: "image_url",
    image_url: { url: `data:image/png;base64,${(await readFile(path)).toString("base64")}` },
  })),
);

function request(content) {
  const text = { type: "text", text: "Is there any defect in this picture? If so, where?" };
  return {
    model,
    messages: [{ role: "user", content: [...content, text] }],
    max_tokens: 48,
    temperature: 0,
  };
}

const chat = await client.chat.completions.create({
  ...request([pictures[1]]),
  inspection: { map: true },
});
const several = await client.chat.completions.create(request(pictures));

const streamed = { text: "", inspections: null };
const stream = await client.chat.completions.create({ ...request([pictures[1]]), stream: true });
for await (const chunk of stream) {
  streamed.text += chunk.choices[0]?.delta?.content ?? "";
  streamed.inspections = chunk.inspections ?? streamed.inspections;
}

let refusal = null;
try {
  await client.chat.completions.create({ ...request([]), inspection: { map: "maybe" } });
} catch (error) {
  refusal = { name: error.constructor.name, status: error.status, message: error.message };
}

const told = (completion) => ({
  text: completion.choices[0].message.content,
  inspections: completion.inspections,
});
console.log(JSON.stringify({ chat: told(chat), several: told(several), streamed, refusal }));
