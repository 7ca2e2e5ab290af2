// Command go is a client of Latchkey by what oapi-codegen generates from openapi.yaml. It signs up,
// logs in, refreshes the session, and prints whose it is. Its arguments are the URL of a server and
// an email address without an account.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log"
	"net/http"
	"net/http/cookiejar"
	"os"

	"github.com/oapi-codegen/runtime/types"

	"latchkey/clients/go/latchkey"
)

//go:generate go tool oapi-codegen -config oapi-codegen.yaml ../../openapi.yaml

func main() {
	log.SetFlags(0)
	if err := run(context.Background(), os.Args[1], os.Args[2]); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context, server, email string) error {
	// The jar keeps the refresh token and sends it by itself.
	jar, err := cookiejar.New(nil)
	if err != nil {
		return err
	}
	withJar := latchkey.WithHTTPClient(&http.Client{Jar: jar})
	client, err := latchkey.NewClientWithResponses(server, withJar)
	if err != nil {
		return err
	}
	const password = "correct horse battery"
	signup, err := client.SignupWithResponse(ctx, nil, latchkey.SignupRequest{
		Email:    types.Email(email),
		Password: password,
	})
	if err != nil {
		return err
	}
	if signup.JSON201 == nil {
		return refusal(signup.Body)
	}
	if err := login(ctx, client, email, password); err != nil {
		return err
	}
	refresh, err := client.RefreshWithResponse(ctx, nil)
	if err != nil {
		return err
	}
	if refresh.JSON200 == nil {
		return refusal(refresh.Body)
	}
	me, err := client.MeWithResponse(ctx, nil, bearer(refresh.JSON200.AccessToken))
	if err != nil {
		return err
	}
	if me.JSON200 == nil {
		return refusal(me.Body)
	}
	fmt.Println(me.JSON200.User.Email)
	return nil
}

// login gives a wrong password first, to show how an answer is told from the others by its code.
func login(
	ctx context.Context, client *latchkey.ClientWithResponses, email, password string,
) error {
	credentials := latchkey.LoginRequest{Email: email, Password: "a wrong guess"}
	wrong, err := client.LoginWithResponse(ctx, nil, credentials)
	if err != nil {
		return err
	}
	const invalid = latchkey.WrongCredentialsErrorCodeInvalidCredentials
	if wrong.JSON401 == nil || wrong.JSON401.Code != invalid {
		return fmt.Errorf("a wrong password: %s %s", wrong.Status(), wrong.Body)
	}
	credentials.Password = password
	right, err := client.LoginWithResponse(ctx, nil, credentials)
	if err != nil {
		return err
	}
	if right.JSON200 == nil {
		return refusal(right.Body)
	}
	return nil
}

// bearer shows an access token with a request.
func bearer(token latchkey.AccessToken) latchkey.RequestEditorFn {
	return func(_ context.Context, req *http.Request) error {
		req.Header.Set("Authorization", "Bearer "+token)
		return nil
	}
}

// refusal is what the server says in the one format of all its errors.
func refusal(body []byte) error {
	var refused latchkey.Error
	if err := json.Unmarshal(body, &refused); err != nil {
		return err
	}
	return fmt.Errorf("%s (%s)", refused.Error, refused.Code)
}
