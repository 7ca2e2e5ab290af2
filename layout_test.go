package main

import (
	"bytes"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"go/types"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const (
	maxLines         = 1900 // all production Go: what a reviewer reads in one sitting
	maxFunctionLines = 60
)

// layout says what each file must not use: which packages, and which of the other files.
var layout = map[string]struct{ packages, files []string }{
	"jwt.go":        {[]string{"net/http", "github.com/", "golang.org/"}, []string{"ratelimit.go", "store.go", "middleware.go", "auth.go", "main.go"}},
	"ratelimit.go":  {[]string{"net/http", "github.com/jackc/"}, []string{"jwt.go", "store.go", "middleware.go", "auth.go", "main.go"}},
	"store.go":      {[]string{"net/http"}, []string{"jwt.go", "ratelimit.go", "middleware.go", "auth.go", "main.go"}},
	"middleware.go": {[]string{"github.com/", "golang.org/"}, []string{"auth.go", "main.go"}},
	"auth.go":       {[]string{"github.com/"}, []string{"main.go"}},
	"main.go":       {},
}

// productionFiles parses the package without its tests.
func productionFiles(t *testing.T) (*token.FileSet, map[string]*ast.File) {
	t.Helper()
	names, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	fset, files := token.NewFileSet(), map[string]*ast.File{}
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		if files[name], err = parser.ParseFile(fset, name, nil, parser.SkipObjectResolution); err != nil {
			t.Fatal(err)
		}
	}
	return fset, files
}

// noImports leaves all other packages unknown: only what our own files say of each other is looked at.
type noImports struct{}

func (noImports) Import(string) (*types.Package, error) { return nil, errors.New("not looked at") }

// resolve returns which of the package's own top-level declarations each identifier means.
func resolve(fset *token.FileSet, files map[string]*ast.File) map[*ast.Ident]types.Object {
	var list []*ast.File
	for _, file := range files {
		list = append(list, file)
	}
	info := &types.Info{Uses: map[*ast.Ident]types.Object{}}
	config := types.Config{Importer: noImports{}, Error: func(error) {}} // each import is an error, and passed over
	pkg, _ := config.Check("latchkey", fset, list, info)
	for id, object := range info.Uses {
		if object.Parent() != pkg.Scope() {
			delete(info.Uses, id)
		}
	}
	return info.Uses
}

func TestFiles(t *testing.T) {
	fset, files := productionFiles(t)
	lines := 0
	for name, file := range files {
		if _, known := layout[name]; !known {
			t.Errorf("%s: the server is the files of layout, and no other", name)
		}
		lines += fset.Position(file.FileEnd).Line - 1
	}
	if len(files) < len(layout) {
		t.Errorf("only %d of %d files are there", len(files), len(layout))
	}
	if lines > maxLines {
		t.Errorf("%d lines of production Go, at most %d", lines, maxLines)
	}
}

func TestWhoMayUseWhom(t *testing.T) {
	fset, files := productionFiles(t)
	for name, file := range files {
		for _, spec := range file.Imports {
			path, _ := strconv.Unquote(spec.Path.Value)
			if slices.ContainsFunc(layout[name].packages, func(p string) bool { return strings.HasPrefix(path, p) }) {
				t.Errorf("%s imports %s", name, path)
			}
		}
	}
	used := map[[2]string]bool{}
	for id, object := range resolve(fset, files) {
		user, owner := fset.Position(id.Pos()), fset.Position(object.Pos()).Filename
		used[[2]string{user.Filename, owner}] = true
		if slices.Contains(layout[user.Filename].files, owner) {
			t.Errorf("%v uses %s of %s", user, id.Name, owner)
		}
	}
	// If these were not seen, the search would be blind and the test worth nothing.
	for _, uses := range [][2]string{{"main.go", "auth.go"}, {"auth.go", "store.go"}, {"auth.go", "jwt.go"}, {"middleware.go", "store.go"}} {
		if !used[uses] {
			t.Errorf("no use of %s in %s was found", uses[1], uses[0])
		}
	}
}

func TestHouseRules(t *testing.T) {
	sql := regexp.MustCompile(`(?i)^\s*(SELECT\s.*\sFROM\s|INSERT\s+INTO\s|UPDATE\s.*\sSET\s|DELETE\s+FROM\s)`)
	fset, files := productionFiles(t)
	objects := resolve(fset, files)
	for name, file := range files {
		function := ""
		assigned := func(targets ...ast.Expr) {
			for _, target := range targets {
				if v, ok := objects[root(target)].(*types.Var); ok {
					t.Errorf("%v: package variable %s changes", fset.Position(target.Pos()), v.Name())
				}
			}
		}
		for _, decl := range file.Decls {
			if f, ok := decl.(*ast.FuncDecl); ok {
				if function = f.Name.Name; function == "init" && f.Recv == nil {
					t.Errorf("%v: init function", fset.Position(f.Pos()))
				}
				if n := fset.Position(f.End()).Line - fset.Position(f.Pos()).Line + 1; n > maxFunctionLines {
					t.Errorf("%v: %s has %d lines, at most %d", fset.Position(f.Pos()), function, n, maxFunctionLines)
				}
			}
			ast.Inspect(decl, func(n ast.Node) bool {
				switch n := n.(type) {
				case *ast.AssignStmt:
					assigned(n.Lhs...)
				case *ast.IncDecStmt:
					assigned(n.X)
				case *ast.RangeStmt:
					assigned(n.Key, n.Value)
				case *ast.SelectorExpr:
					pkg, _ := n.X.(*ast.Ident)
					if pkg != nil && pkg.Name == "os" && n.Sel.Name == "Exit" && (name != "main.go" || function != "main") {
						t.Errorf("%v: os.Exit outside main", fset.Position(n.Pos()))
					}
					if pkg != nil && pkg.Name == "time" && slices.Contains([]string{"Now", "Since", "Until"}, n.Sel.Name) && name == "jwt.go" {
						t.Errorf("%v: the clock is a parameter", fset.Position(n.Pos()))
					}
				case *ast.BasicLit:
					if (name == "middleware.go" || name == "auth.go") && n.Kind == token.STRING {
						if text, _ := strconv.Unquote(n.Value); sql.MatchString(text) {
							t.Errorf("%v: SQL outside store.go", fset.Position(n.Pos()))
						}
					}
				}
				return true
			})
		}
	}
}

// root returns the variable that an assignment to target changes: x in x.f, x[i] and *x.
func root(target ast.Expr) *ast.Ident {
	for {
		switch t := target.(type) {
		case *ast.Ident:
			return t
		case *ast.SelectorExpr:
			target = t.X
		case *ast.IndexExpr:
			target = t.X
		case *ast.StarExpr:
			target = t.X
		case *ast.ParenExpr:
			target = t.X
		default:
			return nil
		}
	}
}

func TestModule(t *testing.T) {
	data, err := os.ReadFile("go.mod")
	if err != nil {
		t.Fatal(err)
	}
	var direct []string
	for line := range bytes.Lines(data) {
		fields := strings.Fields(strings.TrimPrefix(string(line), "require "))
		if len(fields) == 2 && strings.HasPrefix(fields[1], "v") {
			direct = append(direct, fields[0])
		}
		if strings.HasPrefix(string(line), "replace") {
			t.Errorf("go.mod: %s", line)
		}
	}
	slices.Sort(direct)
	want := []string{"github.com/jackc/pgx/v5", "github.com/redis/go-redis/v9", "golang.org/x/crypto"}
	if !slices.Equal(direct, want) {
		t.Errorf("go.mod requires %v directly, want %v", direct, want)
	}
}
