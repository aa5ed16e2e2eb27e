// A real, certified OpenID provider with its own sign-in pages. For the tests, it accepts any name.
// It prints its issuer once it listens. Arguments: the console's URL and, for a confidential client,
// the client secret.
import { createServer } from "node:http";
import { pathToFileURL } from "node:url";

const [modules, page, secret] = process.argv.slice(2);
const { Provider } = await import(pathToFileURL(`${modules}/oidc-provider/lib/index.js`));

const server = createServer();
server.listen(0, "127.0.0.1", () => {
  const issuer = `http://127.0.0.1:${server.address().port}`;
  const provider = new Provider(issuer, {
    clients: [
      {
        client_id: "page",
        redirect_uris: [`${page}/signed-in`],
        post_logout_redirect_uris: [`${page}/signed-out`],
        grant_types: ["authorization_code"],
        response_types: ["code"],
        ...(secret ? { client_secret: secret } : { token_endpoint_auth_method: "none" }),
      },
    ],
    claims: { openid: ["sub"], profile: ["tenant", "accounts", "orgs", "groups"] },
    // Put the claims into the id token, where the console reads them.
    conformIdTokenClaims: false,
    findAccount: (_, id) => ({
      accountId: id,
      // zoe+acme+globex belongs to two accounts, and people whose names begin with op- are operators.
      claims: () => ({
        sub: id,
        tenant: `tenant-of-${id}`,
        accounts: id.split("+").slice(1),
        orgs: id.split("+").slice(1).map((org) => ({ id: org, role: "admin" })),
        groups: id.startsWith("op-") ? ["staff", "latchkey operators"] : ["staff"],
      }),
    }),
    pkce: { required: () => true },
    cookies: { keys: ["for tests"] },
  });
  server.on("request", provider.callback());
  console.log(issuer);
});
process.on("SIGTERM", () => process.exit(0));
